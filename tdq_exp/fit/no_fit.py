"""No fit: the float network as it was loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from tdq_exp.fit.fit import Fit, Subject
from tdq_exp.fit.options import LoadOptions
from tdq_exp.runtime.context import RunContext


class Load(Fit[LoadOptions]):
    """The weights as they were loaded; the result depends on them alone."""

    def parts(self, subject: Subject, seed: int) -> dict[str, Any]:
        return {
            "weights": subject.weights,
            "model": {"definition": self.definition(subject)},
            **subject.model.parts(),
        }

    def run(
        self, context: RunContext, net: nn.Module | None, subject: Subject
    ) -> tuple[nn.Module, dict[str, Any]]:
        if net is None:
            raise ValueError("model.weights has no value: there is nothing to load")
        return net, {}
