"""The linear probe of one layer as a scikit-learn estimator."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from probing.probes.linear import fit_linear_probes


class LinearProbe(ClassifierMixin, BaseEstimator):
    """Multinomial logistic regression on standardised features, as :mod:`probing.probes.linear` defines it.

    Args:
        l2: penalty: mean log loss in nats + l2/2 · ‖weights on standardised features‖².
        tolerance: bits per item between the training objective and its minimum at which the solver stops.
        max_iterations: passes over the rows after which it gives up; ``converged_`` is then False.
        device: torch device for the products.

    Attributes:
        classes_: the labels, sorted.
        coef_: float64, (classes, features) or (1, features) for two classes, in the features' own units.
        intercept_: float64, (classes,) or (1,).
        n_features_in_: number of features.
        n_iter_: passes over all rows.
        converged_: whether the tolerance was met.

    Examples:
        >>> from sklearn.datasets import load_digits
        >>> x, y = load_digits(return_X_y=True)
        >>> bool(LinearProbe(l2=0.01).fit(x[:1000], y[:1000]).score(x[1000:], y[1000:]) > 0.9)
        True
    """

    def __init__(self, l2: float = 0.01, *, tolerance: float = 1e-6, max_iterations: int = 1000, device: str = "cpu"):
        self.l2 = l2
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.device = device

    def fit(self, X: Any, y: Any) -> LinearProbe:
        """Fit to ``X`` of shape (items, features) and labels ``y``."""
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"The labels hold one class only ({self.classes_[0]!r}); a probe needs at least two.")
        fit = fit_linear_probes(
            X[None],
            index,
            n_classes=len(self.classes_),
            l2=[self.l2],
            device=self.device,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
        )
        scale, mean = fit.scale[0].astype(np.float64), fit.mean[0].astype(np.float64)
        coef = fit.weights[0, 0, 0].T / scale
        intercept = fit.bias[0, 0, 0] - coef @ mean
        if len(self.classes_) == 2:
            coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
        self.coef_, self.intercept_ = coef, intercept
        self.n_iter_, self.converged_ = int(fit.iterations[0, 0, 0]), bool(fit.converged[0, 0, 0])
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Log odds of the second class, (items,), or one logit per class, (items, classes)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        scores = X @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Natural logarithms of the class probabilities, (items, classes)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            scores = np.stack([np.zeros_like(scores), scores], axis=1)
        scores = scores - scores.max(axis=1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class probabilities, (items, classes)."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each item."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]
