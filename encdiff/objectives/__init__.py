"""What the field adds to EncDiff's objective, a file each; all are off unless a configuration asks for them.

Names of `EncDiffConfig`: `anchors` and `skip_dropout` (DyGA), `mutual_information`, `orthogonality`, `token_dropout`
(guidance). `prediction="flow"` needs nothing here: it is a target of `ops.q_sample` and a path of the solvers.
"""
