"""Which scheme each weight of a model is stored by."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightllmd.architecture.schemes import DENSE, Scheme
from lightllmd.architecture.weights import Role, WeightSpec


@dataclass(frozen=True)
class SchemeRule:
    """For some of the weights that may be quantised."""

    scheme: Scheme
    roles: tuple[Role, ...] = ()  # empty: all
    layers: tuple[int, ...] = ()  # empty: all

    def covers(self, weight: WeightSpec) -> bool:
        """Whether it says something of this weight."""
        return (not self.roles or weight.role in self.roles) and (not self.layers or weight.layer in self.layers)


@dataclass(frozen=True)
class WeightSchemes:
    """The last rule that covers a weight says how it is stored; without one it is dense."""

    rules: tuple[SchemeRule, ...] = ()

    @classmethod
    def all(cls, scheme: Scheme) -> WeightSchemes:
        """One scheme for all that may be quantised."""
        return cls((SchemeRule(scheme),))

    def of(self, weight: WeightSpec) -> Scheme:
        """How this weight is stored."""
        if not weight.quantisable:
            return DENSE
        scheme = next((rule.scheme for rule in reversed(self.rules) if rule.covers(weight)), DENSE)
        return replace(scheme, group=weight.group) if weight.group and scheme.group else scheme

    @property
    def dense(self) -> bool:
        """Nothing is quantised."""
        return all(rule.scheme.dense for rule in self.rules)

    @property
    def title(self) -> str:
        """Of the schemes that it names, in the order of its rules; "dense" where there are no others."""
        titles = dict.fromkeys(rule.scheme.title for rule in self.rules if not rule.scheme.dense)
        return ", ".join(titles) or DENSE.title


ALL_DENSE = WeightSchemes()
