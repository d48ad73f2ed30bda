"""Avro schemas of people's own event classes: dataclasses, msgspec Structs and pydantic models. Pure.

Names and types are taken as they are written. What Avro cannot say without doubt is refused with the field's name;
where JSON and Avro differ, the form that any reader of the log understands is chosen: decimals and UUIDs are text, a
choice of values is its plain type, so that a new choice breaks no reader.
"""

from __future__ import annotations

import datetime
import enum
import json
import re
from collections.abc import Callable
from typing import Any

import avro.compatibility
import avro.errors
import avro.schema
import msgspec
from msgspec import inspect as kinds

from jobledger.errors import ConfigError, IncompatibleEvent

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN: dict[type[Any], Any] = {
    kinds.BoolType: "boolean",
    kinds.IntType: "long",
    kinds.FloatType: "double",
    kinds.StrType: "string",
    kinds.BytesType: "bytes",
    kinds.DecimalType: "string",
    kinds.UUIDType: {"type": "string", "logicalType": "uuid"},
    kinds.DateTimeType: {"type": "long", "logicalType": "timestamp-micros"},
    kinds.DateType: {"type": "int", "logicalType": "date"},
    kinds.NoneType: "null",
}
_NO_DEFAULT = object()
#: What fastavro takes as it is.
_KEPT = (bytes, datetime.datetime, datetime.date)


def derive(cls: type[Any], name: str, namespace: str) -> str:
    """The schema of ``cls`` as an Avro record ``namespace.name``: JSON text, the same for the same class.

    Raises `ConfigError` naming the field whose type has no Avro form.
    """
    record = _Deriver(cls, namespace).record(cls, name, cls.__qualname__)
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def is_pydantic(cls: Any) -> bool:
    """Whether ``cls`` is a pydantic model, told without importing pydantic."""
    return isinstance(cls, type) and hasattr(cls, "model_validate") and hasattr(cls, "model_fields")


def check_evolution(subject: str, text: str, earlier: dict[str, str]) -> None:
    """Raise `IncompatibleEvent` unless the schema ``text`` reads what every one of
    ``earlier`` wrote (BACKWARD_TRANSITIVE).

    ``earlier``: texts by whatever names them to people.
    """
    reader = avro.schema.parse(text)
    for which, written in earlier.items():
        try:
            writer = avro.schema.parse(written)
        except avro.errors.SchemaParseException:
            continue  # somebody else's, and no schema: it has written nothing that could be read
        found = avro.compatibility.ReaderWriterCompatibilityChecker().get_compatibility(  # type: ignore[no-untyped-call]
            reader, writer
        )
        if found.compatibility is avro.compatibility.SchemaCompatibilityType.incompatible:
            kinds_of = ", ".join(sorted(i.value for i in found.incompatibilities))
            why = "; ".join(sorted(str(m) for m in found.messages))
            raise IncompatibleEvent(
                f"event {subject!r}: its class cannot read what schema {which} wrote ({kinds_of}: {why}). Give a new field "
                "a default, keep a field's type; or give the event a new name: @app.event(name=…)"
            )


class _Deriver:
    """One class's schema; remembers which records it has defined, for Avro defines each once."""

    def __init__(self, root: type[Any], namespace: str) -> None:
        self._root, self._namespace = root, namespace
        self._defined: dict[str, type[Any]] = {}

    def record(self, cls: type[Any], name: str, where: str) -> dict[str, Any] | str:
        """``cls`` as a record, or its name if it was defined above."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: {name!r} is no Avro name: letters, digits and '_', not beginning with a digit")
        if name in self._defined:
            if self._defined[name] is not cls:
                raise ConfigError(f"{where}: two classes are called {name}; rename one")
            return f"{self._namespace}.{name}"
        self._defined[name] = cls
        fields = [self._field(f, default, kind, f"{where}.{f}") for f, kind, default in _fields_of(cls, where)]
        record: dict[str, Any] = {"type": "record", "name": name, "namespace": self._namespace}
        doc = cls.__dict__.get("__doc__")
        if doc and not doc.startswith(f"{cls.__name__}("):  # a dataclass without one gets its signature
            record["doc"] = " ".join(doc.split())
        return {**record, "fields": fields}

    def _field(self, name: str, default: Any, kind: kinds.Type, where: str) -> dict[str, Any]:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: {name!r} is no Avro name: letters, digits and '_', not beginning with a digit")
        schema = self._type(kind, where)
        field: dict[str, Any] = {"name": name, "type": schema}
        if default is _NO_DEFAULT:
            return field
        if isinstance(schema, list) and "null" in schema:  # Avro's default is of the first kind named
            rest = [s for s in schema if s != "null"]
            field["type"] = ["null", *rest] if default is None else [*rest, "null"]
        try:
            plain = msgspec.to_builtins(default, enc_hook=_unfit)
        except TypeError:
            return field  # readers of older records will be told that it has none
        if isinstance(default, bytes):
            plain = default.decode("latin-1")
        sayable = plain is None or isinstance(plain, bool | int | float | str) or plain in ([], {})
        if sayable and (not isinstance(schema, dict) or schema.get("type") in ("array", "map")):
            field["default"] = plain
        return field

    def _type(self, kind: kinds.Type, where: str) -> Any:
        if isinstance(kind, kinds.Metadata):
            return self._type(kind.type, where)
        plain = _PLAIN.get(type(kind))
        if plain is not None:
            return plain
        match kind:
            case (
                kinds.ListType()
                | kinds.SetType()
                | kinds.FrozenSetType()
                | kinds.VarTupleType()
                | kinds.CollectionType()
            ):
                return {"type": "array", "items": self._type(kind.item_type, where + "[]")}
            case kinds.DictType(key_type=kinds.StrType()):
                return {"type": "map", "values": self._type(kind.value_type, where + "{}")}
            case kinds.LiteralType():
                return self._choice(kind.values, where)
            case kinds.EnumType():
                return self._choice([m.value for m in kind.cls], where)
            case kinds.UnionType():
                return self._union(kind, where)
            case kinds.DataclassType() | kinds.StructType() | kinds.TypedDictType():
                return self.record(kind.cls, kind.cls.__name__, where)
            case kinds.CustomType() if is_pydantic(kind.cls):
                return self.record(kind.cls, kind.cls.__name__, where)
        raise ConfigError(
            f"{where}: {type(kind).__name__.removesuffix('Type')} has no Avro form; use bool, int, float, str, bytes, "
            "datetime, date, UUID, Decimal, an enum, a list, a dict with text keys, another class, or one of these | None"
        )

    def _choice(self, values: Any, where: str) -> str:
        if all(isinstance(v, str) for v in values):
            return "string"
        if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            return "long"
        raise ConfigError(f"{where}: a choice is all text or all whole numbers; these are {list(values)}")

    def _union(self, kind: kinds.UnionType, where: str) -> Any:
        found = [self._type(each, where) for each in kind.types]
        complex_ones = [s for s in found if not isinstance(s, str) or s not in _PLAIN.values()]
        others = [s for s in found if s != "null"]
        if len(others) > 1 and complex_ones:
            raise ConfigError(
                f"{where}: a union of {len(others)} types is ambiguous on the wire; use one type, or | None"
            )
        return ["null", *others] if "null" in found else others


def _fields_of(cls: type[Any], where: str) -> list[tuple[str, kinds.Type, Any]]:
    """(name, type, default) of each field; the default of a factory only where it makes nothing or an empty thing."""
    if is_pydantic(cls):
        return [
            (
                field.alias or name,
                kinds.type_info(field.annotation),
                _NO_DEFAULT if field.is_required() else field.get_default(call_default_factory=False),
            )
            for name, field in cls.model_fields.items()
        ]
    try:
        info = kinds.type_info(cls)
    except TypeError as exc:
        raise ConfigError(f"{where}: its fields cannot be read: {exc}") from exc
    if isinstance(info, kinds.StructType) and info.array_like:
        raise ConfigError(f"{where}: a Struct with array_like=True has no names on the wire; leave array_like out")
    if not isinstance(info, kinds.StructType | kinds.DataclassType | kinds.TypedDictType):
        raise ConfigError(f"{where} is no dataclass, msgspec Struct or pydantic model: an event is a class with fields")
    found: list[tuple[str, kinds.Type, Any]] = []
    for field in info.fields:
        default: Any = _NO_DEFAULT
        if field.default is not msgspec.NODEFAULT:
            default = field.default
        elif field.default_factory in (list, dict, set, frozenset, tuple):
            default = field.default_factory()
        found.append((field.encode_name, field.type, default))
    return found


def _unfit(value: Any) -> Any:
    raise TypeError(type(value).__name__)


Dump = Callable[[Any], dict[str, Any]]


def dumper(cls: type[Any]) -> Dump:
    """A function from an instance to what fastavro writes. Raises `TypeError`, `ValueError` or
    `msgspec.ValidationError` for one whose values are not of its fields' types."""
    if is_pydantic(cls):
        return lambda event: _builtins(event.model_dump(mode="python", by_alias=True))
    return lambda event: _checked(_builtins(event), cls)


def _builtins(value: Any) -> dict[str, Any]:
    return msgspec.to_builtins(value, builtin_types=_KEPT, enc_hook=_nested)  # type: ignore[no-any-return]


def _nested(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="python", by_alias=True)
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"{type(value).__qualname__} has no Avro form")


def _checked(plain: dict[str, Any], cls: type[Any]) -> dict[str, Any]:
    # Annotations are not enforced by Python: what does not fit shall be said here, not by a handler days later.
    msgspec.convert(plain, cls, builtin_types=_KEPT, dec_hook=read_nested)
    return plain


def read_nested(kind: type[Any], value: Any) -> Any:
    """For msgspec: a pydantic model inside another class."""
    if is_pydantic(kind):
        return kind.model_validate(value)
    raise TypeError(f"{kind.__qualname__} has no Avro form")
