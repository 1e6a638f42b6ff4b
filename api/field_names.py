"""`said_in`: errors that name fields as the request's body does, where the engine has words of its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from jaxserve.errors import InvalidRequestError


@contextmanager
def said_in(names: Mapping[str, str]) -> Iterator[None]:
    """Raise what is wrong with a request in the words of its body. `names`: the engine's word -> the body's.

    >>> with said_in({"max_tokens": "max_completion_tokens"}):
    ...     raise InvalidRequestError("max_tokens must be an integer", param="max_tokens")
    Traceback (most recent call last):
    jaxserve.errors.InvalidRequestError: max_completion_tokens must be an integer
    """
    try:
        yield
    except InvalidRequestError as error:
        for word, name in names.items():
            if word != "prompt":  # which is no field's name alone, but a plain word too
                error.message = re.sub(rf"\b{word}\b", name, error.message)
        error.args = (error.message,)
        if error.param is not None:
            error.param = names.get(error.param, error.param)
        raise
