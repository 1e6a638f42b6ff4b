"""Every error a caller can meet, with what the HTTP layer needs to answer it."""

from __future__ import annotations


class JaxserveError(Exception):
    """Base of all errors that jaxserve raises on purpose; its text is safe to show to a user."""


class ConfigError(JaxserveError):
    """A launch file, a flag or a combination of settings is wrong; the CLI prints it and exits with 2."""


class CheckpointError(JaxserveError):
    """A checkpoint is missing, truncated, or does not fit the model; the CLI prints it and exits with 2."""


class TokenizerError(JaxserveError):
    """A tokenizer is missing or of a kind that is not supported; the CLI prints it and exits with 2."""


class RequestError(JaxserveError):
    """A request that cannot be served.

    `status` is the HTTP status, `param` the field at fault, `code` a short machine-readable reason,
    `kind` OpenAI's `error.type`.
    """

    status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequestError(RequestError):
    """The request itself is wrong; sending it again unchanged cannot help."""


class PromptTooLongError(InvalidRequestError):
    """The prompt, or the prompt and `max_tokens`, do not fit the model's context."""

    def __init__(self, message: str, *, param: str | None = "prompt") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ChatTemplateError(InvalidRequestError):
    """The model's chat template refused the messages, or the model has none."""


class ModelNotFoundError(RequestError):
    """The request names a model that this server does not serve."""

    status = 404

    def __init__(self, message: str) -> None:
        super().__init__(message, param="model", code="model_not_found")


class AuthenticationError(RequestError):
    """The API key is missing or wrong."""

    status = 401

    def __init__(self, message: str) -> None:
        super().__init__(message, code="invalid_api_key")


class QueueFullError(RequestError):
    """The waiting queue is full; try again after `retry_after_s` seconds."""

    status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message, code="queue_full")
        self.retry_after_s = retry_after_s


class ServerDrainingError(RequestError):
    """The server is shutting down and takes no new requests."""

    status = 503
    kind = "server_error"

    def __init__(self, message: str = "the server is shutting down and takes no new requests") -> None:
        super().__init__(message, code="server_draining")


class EngineDeadError(RequestError):
    """The engine process died while the request ran, or is being restarted."""

    status = 503
    kind = "server_error"

    def __init__(self, message: str = "the engine stopped while this request ran; it is being restarted") -> None:
        super().__init__(message, code="engine_dead")


class RequestFailedError(RequestError):
    """This one request failed inside the engine; others were not touched."""

    status = 500
    kind = "server_error"

    def __init__(self, message: str) -> None:
        super().__init__(message, code="request_failed")
