"""SAP, the separated attribute predictability (Kumar et al. 2018, arXiv 1711.00848, section 3)."""

import numpy as np

from encdiff.errors import InputError
from encdiff.metrics.samples import check_split, relabel

STEPS = 100  # of Newton's method; about ten suffice
TOLERANCE = 1e-10  # on the gradient, relative to the first


def sap(
    codes_train: np.ndarray,
    factors_train: np.ndarray,
    codes_test: np.ndarray,
    factors_test: np.ndarray,
    *,
    C: float = 0.01,
) -> dict:
    """Mean over factors of the test accuracy from the best single code minus that from the second best.

    codes: (n, N) floats, N >= 2; factors: (n, F) integers, taken as classes. A linear support vector machine predicts
    each factor from each code: squared hinge, penalty `C`, balanced classes, one against the rest, penalised
    intercept, which is scikit-learn's `LinearSVC(C=0.01, class_weight="balanced")` of Locatello et al. 2019
    (arXiv 1811.12359), here solved to the optimum. The penalty makes the score depend on the codes' scale.

    Returns `sap` in [0, 1] and `accuracy` (N, F). Raises InputError as `check_split`.
    """
    if not C > 0:
        raise InputError(f"C is {C!r}; it must be positive")
    x, y, x_test, y_test = check_split(codes_train, factors_train, codes_test, factors_test, least_codes=2)
    labels, values = relabel(y)
    accuracy = np.empty((x.shape[1], y.shape[1]))
    for i in range(x.shape[1]):
        order = np.argsort(x[:, i], kind="stable")
        for k, v in enumerate(values):
            w, b = _Machines(x[order, i], labels[order, k], len(v), C).solve()
            decision = x_test[:, i, None] * w + b
            best = decision.argmax(axis=1) if len(v) > 2 else (decision[:, 0] > 0).astype(int)
            accuracy[i, k] = (v[best] == y_test[:, k]).mean()
    second, best = np.sort(accuracy, axis=0)[-2:]
    return {"sap": float((best - second).mean()), "accuracy": accuracy}


class _Machines:
    """Slopes w and intercepts b (P,) that minimise (w^2 + b^2) / 2 + sum_i C_i max(0, 1 - y_i (w x_i + b))^2.

    One for each class against the rest, for two classes only the second. In ascending order of x the points inside the
    margin are a prefix or a suffix, of either sign, so sums of 1, x, x^2 over prefixes, of all points and of each
    class, give value, gradient and Hessian without a pass over the points.
    """

    def __init__(self, x: np.ndarray, labels: np.ndarray, num_classes: int, C: float):
        """x (n,) ascending with its labels 0 .. num_classes - 1, each of which occurs."""
        counts = np.bincount(labels)
        starts = np.concatenate([[0], counts.cumsum()])
        by_class = x[np.argsort(labels.astype(np.min_scalar_type(num_classes)), kind="stable")]  # short ones by radix
        self.classes = np.arange(num_classes)[1 if num_classes == 2 else 0 :]
        self.x, self.members = x, [by_class[starts[c] : starts[c + 1]] for c in self.classes]
        self.all, self.each = _prefix_sums(x), _prefix_sums(by_class)
        self.starts, self.ends = starts[self.classes], starts[self.classes + 1]
        balanced = C * len(x) / (num_classes * counts)
        self.C_plus = balanced[self.classes]
        self.C_minus = balanced[:1] if num_classes == 2 else np.full(1, C)  # "balanced" weighs the one, not the rest

    def solve(self) -> tuple[np.ndarray, np.ndarray]:
        """Newton's method on a function that is convex and piecewise quadratic; steps are halved if they overshoot."""
        theta = np.zeros((2, len(self.classes)))
        value, gradient, hessian = self.objective(theta)
        tolerance = TOLERANCE * (1 + np.abs(gradient).max())
        for _ in range(STEPS):
            if np.abs(gradient).max() <= tolerance:
                break
            (a, b), (_, d) = hessian
            step = np.stack([d * gradient[0] - b * gradient[1], a * gradient[1] - b * gradient[0]]) / (a * d - b * b)
            length = np.ones(len(self.classes))
            new = self.objective(theta - step)
            while (worse := new[0] > value * (1 + 1e-12)).any() and length.min() > 1e-9:
                length = np.where(worse, length / 2, length)
                new = self.objective(theta - length * step)
            theta, (value, gradient, hessian) = theta - length * step, new
        return theta[0], theta[1]

    def objective(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value (P,), gradient (2, P) and Hessian (2, 2, P) at theta = (w, b)."""
        w, b = theta
        slope = np.where(w == 0, np.finfo(float).tiny, w)
        with np.errstate(over="ignore"):
            edges = np.stack([(1 - b) / slope, (-1 - b) / slope])  # where w x + b is 1, and -1
        cuts = np.array([np.searchsorted(x, edge) for x, edge in zip(self.members, edges.T, strict=True)]).T
        total = self.each[:, self.ends] - self.each[:, self.starts]
        below = self.each[:, self.starts + cuts] - self.each[:, None, self.starts]  # (3, 2, P)
        others = self.all[:, np.searchsorted(self.x, edges[1])] - below[:, 1]
        all_others = self.all[:, -1:] - total
        plus = np.where(slope > 0, below[:, 0], total - below[:, 0])  # w x + b < 1
        minus = np.where(slope > 0, all_others - others, others)  # w x + b > -1
        value, gradient = (w * w + b * b) / 2, theta.copy()
        hessian = np.stack([np.stack([np.ones_like(w), 0 * w]), np.stack([0 * w, np.ones_like(w)])])
        for y, (s0, s1, s2) in ((1, self.C_plus * plus), (-1, self.C_minus * minus)):
            value += s0 * (1 - 2 * y * b + b * b) + 2 * s1 * w * (b - y) + s2 * w * w
            gradient += 2 * np.stack([w * s2 + (b - y) * s1, w * s1 + (b - y) * s0])
            hessian += 2 * np.stack([np.stack([s2, s1]), np.stack([s1, s0])])
        return value, gradient, hessian


def _prefix_sums(x: np.ndarray) -> np.ndarray:
    """Sums of 1, x, x^2 over the first 0, 1, .. n points: (3, n + 1)."""
    sums = np.zeros((3, len(x) + 1))
    np.cumsum(np.stack([np.ones_like(x), x, x * x]), axis=1, out=sums[:, 1:])
    return sums
