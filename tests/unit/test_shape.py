"""The figures of `tests.shape`, for code that is small enough to count by hand."""

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
    """Each field counts once. ``self`` is not counted as a parameter, and a docstring is not counted as lines."""
    tree = ast.parse(CODE)
    (small,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert shape.fields(small) == 5
    functions = dict(shape.functions(tree))
    assert list(functions) == ["Small.__init__", "Small.__init__.inner"]
    assert [shape.parameters(functions["Small.__init__"]), shape.length(functions["Small.__init__"])] == [2, 5]


def test_all_nodes_of_a_cycle_are_found() -> None:
    """Nodes that reach each other are one group. A node that only leads to a group is in no group."""
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": {"e"}, "e": {"b"}, "x": {"y"}, "y": {"x"}, "z": set()}
    assert shape.cycles(graph) == [["b", "c", "d", "e"], ["x", "y"]]


def test_each_module_is_counted_once() -> None:
    """Linked folders are not counted twice, and the names are import names."""
    modules = shape.modules()
    names = [module.name for module in modules]
    assert len(set(names)) == len(names)
    assert {"jobledger.app", "jobledger.consumers.worker.worker", "jobledger.schemas.events"} <= set(names)
    assert "jobledger.consumers.worker.worker" in shape.imports(modules)["jobledger.cli.running"]


def test_no_modules_or_packages_import_each_other_in_a_cycle() -> None:
    """Imports inside functions and imports only for types count, too."""
    modules = shape.modules()
    graph = shape.imports(modules)
    assert shape.cycles(graph) == []
    assert shape.cycles(shape.packages(modules, graph)) == []
