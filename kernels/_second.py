"""Second derivatives: the kernels have none, and say so."""

from torch.library import CustomOpDef


def refuse_second(*backward: CustomOpDef) -> None:
    """Let a derivative of these ops, which compute gradients, raise NotImplementedError."""
    for op in backward:
        op.register_autograd(refusal(op._name))


def refusal(name: str):
    """A backward that raises."""

    def refuse(ctx, *_):
        raise NotImplementedError(f"{name} has no derivative: for second ones take encdiff.use_impl('reference')")

    return refuse
