"""`StructuredOutputsParams`: what an answer must look like, in vLLM's words, and the checks that need no grammar."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from jaxserve.errors import InvalidRequestError
from jaxserve.nesting import is_deeper_than

MAX_CONSTRAINT_CHARS = 2**18  # of a schema, an expression, a grammar, or all choices together
MAX_CHOICES = 4096
MAX_SCHEMA_DEPTH = 120  # levels of objects and lists; what compiles grammars reads 128


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one constraint, and how JSON may be written. As vLLM's class of this name."""

    json: str | dict[str, Any] | None = None  # a JSON schema, or its text
    regex: str | None = None  # of the whole answer
    choice: list[str] | None = None
    grammar: str | None = None  # in EBNF as llama.cpp writes it (GBNF), or in Lark's notation
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # JSON without any
    disable_additional_properties: bool = False  # objects have the properties of their schema alone
    whitespace_pattern: str | None = None  # what may stand between the tokens of JSON

    @property
    def constraint(self) -> str:
        """The name of the one constraint that is given; "" where none is."""
        return next((name for name in CONSTRAINTS if getattr(self, name) not in (None, False)), "")

    def validate(self) -> StructuredOutputsParams:
        """Check types, sizes and that there is one constraint; raises `InvalidRequestError`."""
        given = [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise InvalidRequestError(
                f"structured_outputs must have exactly one of {', '.join(CONSTRAINTS)}, got "
                f"{' and '.join(given) or 'none'}",
                param=_PARAM,
            )
        for field in fields(self):
            value, allowed = getattr(self, field.name), _TYPES[field.name]
            if value is not None and not isinstance(value, allowed):
                names = " or ".join(kind.__name__ for kind in allowed)
                raise InvalidRequestError(f"{field.name} must be {names}, got {type(value).__name__}", param=_PARAM)
        self._check_sizes()
        return self

    def _check_sizes(self) -> None:
        if self.choice is not None:
            if not self.choice or any(not isinstance(text, str) or not text for text in self.choice):
                raise InvalidRequestError("choice must hold at least one text, and no empty one", param=_PARAM)
            if len(self.choice) > MAX_CHOICES:
                raise InvalidRequestError(
                    f"choice takes at most {MAX_CHOICES} texts, got {len(self.choice)}", param=_PARAM
                )
        if isinstance(self.json, dict) and is_deeper_than(self.json, MAX_SCHEMA_DEPTH):
            raise InvalidRequestError(
                f"a JSON schema must not be nested more than {MAX_SCHEMA_DEPTH} levels deep", param=_PARAM
            )
        texts = [self.json, self.regex, self.grammar, self.whitespace_pattern, *(self.choice or ())]
        num_chars = sum(len(text) for text in texts if isinstance(text, str))
        if num_chars > MAX_CONSTRAINT_CHARS:
            raise InvalidRequestError(
                f"structured_outputs takes at most {MAX_CONSTRAINT_CHARS} characters, got {num_chars}", param=_PARAM
            )


_PARAM = "structured_outputs"
CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")
_TYPES: dict[str, tuple[type, ...]] = {
    "json": (dict, str),
    "regex": (str,),
    "choice": (list, tuple),
    "grammar": (str,),
    "json_object": (bool,),
    "disable_any_whitespace": (bool,),
    "disable_additional_properties": (bool,),
    "whitespace_pattern": (str,),
}
