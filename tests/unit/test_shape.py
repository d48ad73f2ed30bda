"""The figures that say how hard the code is to follow, on code that is small enough to count by hand."""

from __future__ import annotations

import ast

from tests import shape

CODE = '''
class Small:
    __slots__ = ("a", "b")
    c: int

    def __init__(self, a: int, *, d: int) -> None:
        """Two lines of
        docstring."""
        self.a, self.d = a, d

        async def inner() -> None:
            self.e = 1
'''


def test_a_class_and_its_functions_are_counted() -> None:
    """Fields of every kind count once; ``self`` is no parameter, and a docstring no length."""
    tree = ast.parse(CODE)
    (small,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert shape.fields(small) == 5
    found = dict(shape.functions(tree))
    assert list(found) == ["Small.__init__", "Small.__init__.inner"]
    assert [shape.parameters(found["Small.__init__"]), shape.length(found["Small.__init__"])] == [2, 5]


def test_cycles_are_found_whole() -> None:
    """Nodes that reach each other are one group, and a node that only leads there is in none."""
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": {"b"}, "x": {"y"}, "y": {"x"}, "z": set()}
    assert shape.cycles(graph) == [["b", "c", "d", "e"], ["x", "y"]]


def test_each_module_stands_once() -> None:
    """The folders that the package sees through links are not counted twice, and names are those that are imported."""
    found = shape.modules()
    names = [module.name for module in found]
    assert len(set(names)) == len(names)
    assert {"jobledger.app", "jobledger.consumers.worker.worker", "jobledger.schemas.events"} <= set(names)
    assert "jobledger.consumers.worker.worker" in shape.imports(found)["jobledger.cli.running"]


def test_nothing_imports_itself_by_way_of_others() -> None:
    """Neither modules nor packages, also not for types only or inside of functions."""
    found = shape.modules()
    graph = shape.imports(found)
    assert shape.cycles(graph) == []
    assert shape.cycles(shape.packages(found, graph)) == []
