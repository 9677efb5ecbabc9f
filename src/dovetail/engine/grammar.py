"""placeholder"""

from typing import Any, Literal

from dovetail.config import Record


class Grammar(Record):
    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str = ""


GrammarState = Any


class GrammarCompiler:
    def __init__(self, *a): ...
    def start(self, g):
        raise NotImplementedError
