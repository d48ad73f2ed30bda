"""Derives Avro schemas from users' event classes: dataclasses, msgspec Structs and pydantic models. Pure.

Names and types are used as they are in the class. A type that Avro cannot represent unambiguously is refused, and the
error names the field. If JSON and Avro differ, the schema uses the form that every reader of the log understands:
decimals and UUIDs are text, and a choice of values has the values' plain type, so that a new value breaks no reader.
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
from jobledger.schemas import avro_defaults
from jobledger.schemas.exact import plain_json

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
_NO_DEFAULT: Any = object()
#: Factories that always return an empty value.
_EMPTY = (list, dict, set, frozenset, tuple)
#: Types whose values are passed to fastavro unchanged.
_KEPT = (bytes, datetime.datetime, datetime.date)


def derive(cls: type[Any], name: str, namespace: str) -> str:
    """Return the schema of ``cls`` as an Avro record ``namespace.name``: JSON text, the same for the same class.

    Raises `ConfigError` that names the field whose type has no Avro form.
    """
    record = _Deriver(cls, namespace).record(cls, name, cls.__qualname__)
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def is_pydantic(cls: Any) -> bool:
    """Return whether ``cls`` is a pydantic model, without importing pydantic."""
    return isinstance(cls, type) and hasattr(cls, "model_validate") and hasattr(cls, "model_fields")


def check_evolution(subject: str, text: str, earlier: dict[str, str]) -> None:
    """Raise `IncompatibleEvent` unless the schema ``text`` can read the records that were written with each schema in
    ``earlier`` (BACKWARD_TRANSITIVE).

    ``earlier``: the texts of schemas, by the name that messages show; texts that are not an Avro schema are skipped.
    """
    reader = avro.schema.parse(text)
    for which, written in earlier.items():
        try:
            writer = avro.schema.parse(written)
        except avro.errors.SchemaParseException:
            continue  # a text of another program, not a schema: no records were written with it
        result = avro.compatibility.ReaderWriterCompatibilityChecker().get_compatibility(  # type: ignore[no-untyped-call]
            reader, writer
        )
        if result.compatibility is avro.compatibility.SchemaCompatibilityType.incompatible:
            kinds_of = ", ".join(sorted(i.value for i in result.incompatibilities))
            why = "; ".join(sorted(str(m) for m in result.messages))
            raise IncompatibleEvent(
                f"event {subject!r}: its class cannot read records of schema {which} ({kinds_of}: {why}). Give each "
                "new field "
                "a default (a value: the result of a default_factory is not in the schema) and keep the types of "
                "fields; or "
                "give the event a new name: @app.event(name=…)"
            )


class _Deriver:
    """Derives one class's schema. Stores the records defined so far, because Avro allows only one definition of
    each."""

    def __init__(self, root: type[Any], namespace: str) -> None:
        self._root, self._namespace = root, namespace
        self._defined: dict[str, type[Any]] = {}
        self._records: dict[str, dict[str, Any]] = {}

    def record(self, cls: type[Any], name: str, where: str) -> dict[str, Any] | str:
        """Return ``cls`` as a record, or only its name if it is already defined. Raises `ConfigError`."""
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: {name!r} is no Avro name: letters, digits and '_', not beginning with a digit")
        if name in self._defined:
            if self._defined[name] is not cls:
                raise ConfigError(f"{where}: two classes are called {name}; rename one")
            return f"{self._namespace}.{name}"
        self._defined[name] = cls
        if is_pydantic(cls) and (bytes_path := _first_bytes(cls, where, set())):
            raise ConfigError(
                f"{bytes_path}: bytes in a pydantic model would reach a handler changed: the handler's arguments are "
                "JSON, where "
                "pydantic does not decode base64. Make the model a dataclass or a msgspec Struct, or write the bytes as text"
            )
        fields = [self._field(f, default, kind, f"{where}.{f}") for f, kind, default in _fields_of(cls, where)]
        record: dict[str, Any] = {"type": "record", "name": name, "namespace": self._namespace}
        doc = cls.__dict__.get("__doc__")
        if doc and not doc.startswith(f"{cls.__name__}("):  # Python gives a dataclass without a docstring its signature
            record["doc"] = " ".join(doc.split())
        self._records[f"{self._namespace}.{name}"] = record = {**record, "fields": fields}
        return record

    def _field(self, name: str, default: Any, kind: kinds.Type, where: str) -> dict[str, Any]:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: {name!r} is no Avro name: letters, digits and '_', not beginning with a digit")
        schema = self._type(kind, where)
        field: dict[str, Any] = {"name": name, "type": schema}
        if default is _NO_DEFAULT:
            return field
        try:
            plain = msgspec.to_builtins(default, builtin_types=_KEPT, enc_hook=_nested, order="deterministic")
            field["type"], field["default"] = avro_defaults.avro_default(schema, plain, self._records)
        except (TypeError, ValueError) as exc:
            raise ConfigError(
                f"{where}: its default {default!r} cannot be written in the event's schema: {exc}. Give another default, or a "
                "default_factory: then the schema has no default"
            ) from exc
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
        raise ConfigError(f"{where}: a choice must be all text or all whole numbers; these values are {list(values)}")

    def _union(self, kind: kinds.UnionType, where: str) -> Any:
        branches = [self._type(each, where) for each in kind.types]
        complex_ones = [s for s in branches if not isinstance(s, str) or s not in _PLAIN.values()]
        others = [s for s in branches if s != "null"]
        if len(others) > 1 and complex_ones:
            raise ConfigError(f"{where}: a union of {len(others)} types is ambiguous in Avro; use one type, or | None")
        return ["null", *others] if "null" in branches else others


def _fields_of(cls: type[Any], where: str) -> list[tuple[str, kinds.Type, Any]]:
    """Return (name, type, default) of each field. The value of a default_factory counts as a default only if the
    factory is in `_EMPTY`. Raises `ConfigError`."""
    if is_pydantic(cls):
        return [_model_field(cls, name, field, where) for name, field in cls.model_fields.items()]
    try:
        info = kinds.type_info(cls)
    except TypeError as exc:
        raise ConfigError(f"{where}: its fields cannot be read: {exc}") from exc
    if isinstance(info, kinds.StructType) and info.array_like:
        raise ConfigError(f"{where}: a Struct with array_like=True has no field names in Avro; leave array_like out")
    if not isinstance(info, kinds.StructType | kinds.DataclassType | kinds.TypedDictType):
        raise ConfigError(
            f"{where} is not a dataclass, msgspec Struct or pydantic model: an event is a class with fields"
        )
    fields: list[tuple[str, kinds.Type, Any]] = []
    for field in info.fields:
        default: Any = _NO_DEFAULT
        if field.default is not msgspec.NODEFAULT:
            default = field.default
        elif field.default_factory in _EMPTY:
            default = field.default_factory()
        fields.append((field.encode_name, field.type, default))
    return fields


def _model_field(cls: Any, name: str, field: Any, where: str) -> tuple[str, kinds.Type, Any]:
    """Return (name, type, default) of a pydantic model's field. Raises `ConfigError` if the field is read under another
    name than it is written."""
    written = name if field.serialization_alias is None else field.serialization_alias
    read = field.validation_alias
    if read is None or not cls.model_config.get("validate_by_alias", True):
        read = name
    if read != written:
        raise ConfigError(
            f"{where}.{name}: it is written as {written!r} and read as {read!r}, so no event could be read; give it "
            "one alias=… in place of validation_alias and serialization_alias, and leave validate_by_alias on"
        )
    default = _NO_DEFAULT
    if field.default_factory in _EMPTY:
        default = field.default_factory()
    elif field.default_factory is None and not field.is_required():
        default = field.default
    return written, kinds.type_info(field.annotation), default


def _first_bytes(cls: type[Any], where: str, seen: set[type[Any]]) -> str | None:
    """Return the path of the first field with bytes, in this class or a class of its fields; None if there is none."""
    seen.add(cls)

    def of(kind: kinds.Type, where: str) -> str | None:
        match kind:
            case kinds.BytesType():
                return where
            case kinds.Metadata():
                return of(kind.type, where)
            case kinds.UnionType():
                return next(filter(None, (of(each, where) for each in kind.types)), None)
            case kinds.DictType():
                return of(kind.value_type, where)
            case kinds.DataclassType() | kinds.StructType() | kinds.TypedDictType():
                return None if kind.cls in seen else _first_bytes(kind.cls, where, seen)
            case kinds.CustomType() if is_pydantic(kind.cls) and kind.cls not in seen:
                return _first_bytes(kind.cls, where, seen)
        return of(kind.item_type, where) if hasattr(kind, "item_type") else None

    return next(filter(None, (of(kind, f"{where}.{name}") for name, kind, _ in _fields_of(cls, where))), None)


Dump = Callable[[Any], dict[str, Any]]


def dumper(cls: type[Any]) -> Dump:
    """Return a function that converts an instance to values that fastavro writes. That function raises `TypeError`,
    `ValueError` or `msgspec.ValidationError` for an instance whose values do not have its fields' types."""
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
    if isinstance(value, str | int | float):  # subclasses
        return plain_json(value)
    raise TypeError(f"{type(value).__qualname__} has no Avro form")


def _checked(plain: dict[str, Any], cls: type[Any]) -> dict[str, Any]:
    # Python does not enforce annotations. A value that does not fit must be reported here, not by a handler days later.
    msgspec.convert(plain, cls, builtin_types=_KEPT, dec_hook=read_nested)
    return plain


def read_nested(kind: type[Any], value: Any) -> Any:
    """Convert a value to a pydantic model inside another class; a ``dec_hook`` for msgspec. Raises `TypeError` for any
    other type."""
    if is_pydantic(kind):
        return kind.model_validate(value)
    raise TypeError(f"{kind.__qualname__} has no Avro form")
