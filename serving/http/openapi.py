"""What `/openapi.json` says beyond what FastAPI finds in the routes: errors, examples, and what follows from what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serving.http.errors import JsonObject


class ErrorDetail(BaseModel):
    """What went wrong. `problems`: everything that was found in an upload."""

    message: str
    type: str
    param: str | None
    code: str | None
    problems: list[str] | None = None


class ErrorBody(BaseModel):
    """The body of every error: OpenAI's envelope."""

    error: ErrorDetail


EXAMPLES: Mapping[str, object] = {
    "name": "sentiment",
    "model": "sentiment:prod",
    "alias": "prod",
    "version": 1,
    "tenant": "acme",
}
"""Parameters' examples by name. A delta that is called so makes those of the routes work as they stand."""

BODIES: Mapping[str, JsonObject] = {
    "CompletionBody": {
        "model": "sentiment@v1",
        "prompt": "Review: works as advertised.\nAnswer:",
        "max_tokens": 4,
        "temperature": 0,
    },
    "ChatBody": {
        "model": "sentiment:prod",
        "messages": [{"role": "user", "content": "Does it work?"}],
        "max_completion_tokens": 4,
    },
    "ClassifyBody": {"model": "sentiment:prod", "input": ["Works as advertised."]},
    "FillMaskBody": {"model": "sentiment:prod", "input": "It works as [MASK].", "top_k": 3},
    "AliasBody": {"version": 1},
    "FileUploadBody": {
        "bytes": 3_300_000_000,
        "filename": "adapter_model.safetensors",
        "mime_type": "application/octet-stream",
        "purpose": "user_data",
    },
    "TenantBody": {"name": "umbrella", "requests_per_min": 600, "tokens_per_min": 100_000},
    "LimitsBody": {"requests_per_min": 600, "max_concurrency": 8, "service_class": "standard"},
    "StateBody": {"disabled": False},
    "KeyBody": {"tenant": "acme", "scopes": ["infer"], "adapters": ["support-*"], "label": "support desk"},
    "RotateBody": {"overlap_s": 3600},
}
"""Bodies' examples by schema."""

STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer; or, with `stream`, its chunks as server-sent events.",
        "content": {
            "text/event-stream": {
                "itemSchema": {
                    "type": "object",
                    "properties": {"data": {"type": "string", "description": "A chunk as JSON, or [DONE]."}},
                    "required": ["data"],
                },
            }
        },
    }
}
"""The answer of an operation that streams where its body asks for it, beside what FastAPI finds.

`itemSchema` describes each event (OpenAPI 3.2, "Sequential Media Types"), as FastAPI has it for its own streams.
"""

_Operation = tuple[str, str]
_UPLOAD = ("put", "/v1/adapters/{name}/versions")
_VERSION = "/v1/adapters/{name}/versions/{version}"
_ADAPTER = "/v1/adapters/{name}"
_GRANT = f"{_ADAPTER}/grants/{{tenant}}"
_OF_UPLOAD = {"name": "$request.path.name", "version": "$response.body#/version"}
_FILE_UPLOAD = "/v1/uploads/{upload_id}"
_OF_FILE_UPLOAD = {"upload_id": "$response.body#/id"}
_FILE = "/v1/files/{file_id}"
_OF_FILE = {"file_id": "$response.body#/file/id"}
_FIRST = {"name": "$response.body#/data/0/name"}
_KEY = {"key_id": "$response.body#/id"}
_TENANT = {"name": "$response.body#/id"}

LINKS: Mapping[tuple[_Operation, str], Mapping[_Operation, Mapping[str, str]]] = {
    (_UPLOAD, "201"): {
        ("get", _VERSION): _OF_UPLOAD,
        ("delete", _VERSION): _OF_UPLOAD,
        ("get", _ADAPTER): {"name": "$request.path.name"},
        ("put", "/v1/adapters/{name}/aliases/{alias}"): {"name": "$request.path.name"},
        ("get", "/v1/models/{model}"): {"model": "$response.body#/id"},
    },
    (("delete", _VERSION), "200"): {
        ("post", f"{_VERSION}/undelete"): {
            "name": "$request.path.name",
            "version": "$request.path.version",
        },
    },
    (("get", "/v1/adapters"), "200"): {
        ("get", _ADAPTER): _FIRST,
        ("get", f"{_ADAPTER}/versions"): _FIRST,
        ("get", f"{_ADAPTER}/grants"): _FIRST,
        ("delete", _ADAPTER): _FIRST,
    },
    (("post", "/v1/uploads"), "200"): {
        ("get", _FILE_UPLOAD): _OF_FILE_UPLOAD,
        ("post", f"{_FILE_UPLOAD}/parts"): _OF_FILE_UPLOAD,
        ("post", f"{_FILE_UPLOAD}/cancel"): _OF_FILE_UPLOAD,
    },
    (("post", f"{_FILE_UPLOAD}/complete"), "200"): {
        ("get", _FILE): _OF_FILE,
        ("delete", _FILE): _OF_FILE,
    },
    (("put", _GRANT), "200"): {
        ("delete", _GRANT): {"name": "$request.path.name", "tenant": "$request.path.tenant"},
        ("get", f"{_ADAPTER}/grants"): {"name": "$request.path.name"},
    },
    (("get", "/v1/models"), "200"): {("get", "/v1/models/{model}"): {"model": "$response.body#/data/0/id"}},
    (("post", "/v1/admin/tenants"), "201"): {
        ("get", "/v1/admin/tenants/{name}"): _TENANT,
        ("put", "/v1/admin/tenants/{name}/limits"): _TENANT,
        ("put", "/v1/admin/tenants/{name}/state"): _TENANT,
        ("get", "/v1/admin/keys"): {"tenant": "$response.body#/id"},
    },
    (("post", "/v1/admin/keys"), "201"): {
        ("post", "/v1/admin/keys/{key_id}/rotate"): _KEY,
        ("delete", "/v1/admin/keys/{key_id}"): _KEY,
    },
}
"""(operation, its status) -> operations that can follow, with the parameters that it gives them."""


class DescribedApp(FastAPI):
    """A FastAPI application whose description says what its routes really answer."""

    def openapi(self) -> JsonObject:
        """The description, made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            schemas = document["components"]["schemas"]
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            body = ErrorBody.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= body.pop("$defs") | {"ErrorBody": body}
            for name, body_example in BODIES.items():
                if name in schemas:  # administrators' routes may be another application's
                    schemas[name]["examples"] = [body_example]
            for (method, path), operation in _operations(document):
                _describe_errors(method, path, operation)
                for parameter in operation.get("parameters", ()):
                    if (example := EXAMPLES.get(parameter["name"])) is not None and parameter["required"]:
                        parameter["example"] = example
            _link(document)
        assert self.openapi_schema is not None
        return self.openapi_schema


def _operations(document: JsonObject) -> Iterator[tuple[_Operation, JsonObject]]:
    for path, item in document["paths"].items():
        for method, operation in item.items():
            yield (method, path), operation


def _describe_errors(method: str, path: str, operation: JsonObject) -> None:
    """Say which errors this operation has. FastAPI's own guess, 422, is never answered."""
    takes_body = "requestBody" in operation
    generates = bool({"generation", "pooling"} & set(operation.get("tags", ())))
    statuses = {503}
    if "security" in operation:
        statuses |= {401, 403}
    if takes_body or operation.get("parameters"):
        statuses |= {400}
    if takes_body or "{" in path:
        statuses |= {404}
    if takes_body:
        statuses |= {413, 429}
    if method != "get" and not generates:
        statuses |= {409}
    responses: dict[str, Any] = operation["responses"]
    responses.pop("422", None)
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    for status in sorted(statuses):
        responses[str(status)] = {"description": HTTPStatus(status).phrase, "content": content}


def _link(document: JsonObject) -> None:
    known = dict(_operations(document))
    for (source, status), targets in LINKS.items():
        if source not in known:
            continue
        links = known[source]["responses"][status].setdefault("links", {})
        for target, parameters in targets.items():
            name = known[target]["operationId"]
            links[name] = {"operationId": name, "parameters": dict(parameters)}
