"""Reading keys of a config.json: one fact has many names, and any value may be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from traces.errors import TraceError

_LARGEST = 2**40  # no count of a model is larger; refuses values that would exhaust memory
_LARGEST_LAYERS = 10_000
_TEXT_PARTS = ("thinker_config", "text_config", "llm_config", "language_config")
_NESTED_PARTS = ("ffn_config", "attn_config", "moe_config")  # DBRX, Yuan


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """One flat view of a config: the text model's keys, then the keys around it.

    name    the model's name, for error messages
    values  key to JSON value; null counts as absent
    """

    name: str
    values: Mapping[str, object]

    def has(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self.values.get(key) is not None

    def optional(self, *keys: str) -> int | None:
        """The first present key as a whole number >= 0; a list must repeat one number."""
        for key in keys:
            if self.has(key):
                return self._whole(key)
        return None

    def number(self, *keys: str, default: int) -> int:
        """The first present key as a whole number >= 0, or the default."""
        found = self.optional(*keys)
        return default if found is None else found

    def need(self, *keys: str) -> int:
        """The first present key as a whole number >= 1; TraceError naming the keys if none is."""
        for key in keys:
            if self.has(key):
                if (found := self._whole(key)) >= 1:
                    return found
                raise self.error(key, "expected at least 1")
        raise TraceError(f"model {self.name}: config has no {' or '.join(keys)}")

    def layers(self, *keys: str) -> int:
        """A number of layers, bounded so that a wrong value cannot exhaust memory."""
        n_layers = self.need(*keys)
        if n_layers > _LARGEST_LAYERS:
            raise TraceError(
                f"model {self.name}: {keys[0]}={n_layers}, expected at most {_LARGEST_LAYERS}"
            )
        return n_layers

    def flag(self, key: str, default: bool = False) -> bool:
        """The key as true or false, or the default."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, "expected true or false")
        return value

    def text(self, *keys: str) -> str:
        """The first present key if it is text, else ""."""
        for key in keys:
            if isinstance(value := self.values.get(key), str):
                return value
        return ""

    def entries(self, key: str, n_layers: int) -> list[object]:
        """The list under a key, one entry a layer."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) < n_layers:
            raise self.error(key, f"expected a list with one entry for each of {n_layers} layers")
        return value[:n_layers]  # some configs list prediction layers past the last one

    def wholes(self, key: str) -> list[int]:
        """The list of whole numbers under a key; empty when absent."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(_is_whole(item) for item in value):
            raise self.error(key, "expected a list of whole numbers")
        return [int(item) for item in value]

    def error(self, key: str, expected: str) -> TraceError:
        """TraceError naming the key and its value."""
        shown = repr(self.values.get(key))
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return TraceError(f"model {self.name}: config {key}={shown}, {expected}")

    def _whole(self, key: str) -> int:
        value = self.values[key]
        if isinstance(value, list):
            if not value or any(item != value[0] for item in value):
                raise self.error(key, "expected one number for all layers")
            value = value[0]
        if not isinstance(value, int) or not _is_whole(value) or value > _LARGEST:
            raise self.error(key, f"expected a whole number in 0..{_LARGEST}")
        return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def flatten(config: Mapping[str, object], name: str) -> ConfigKeys:
    """One flat view: nested text_config over the keys around it, ffn and attention parts below."""
    values = dict(config)
    for part in _TEXT_PARTS:
        values = {**values, **_nested(values, part, name)}
    for part in _NESTED_PARTS:
        values = {**_nested(values, part, name), **values}
    return ConfigKeys(name, values)


def _nested(values: Mapping[str, object], part: str, name: str) -> dict[str, object]:
    nested = values.get(part)
    if nested is None:
        return {}
    if not isinstance(nested, Mapping):
        raise TraceError(f"model {name}: config {part} is not an object")
    return {str(key): value for key, value in nested.items() if value is not None}
