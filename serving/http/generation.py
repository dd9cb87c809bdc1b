"""`POST /v1/completions` and `POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from adapters.errors import InvalidRequest
from serving.core import BackboneInfo, ChatMessage, GenerateCall
from serving.http.access import Infer
from serving.http.counting import Usage
from serving.http.edge import set_adapter_digest
from serving.http.errors import JsonObject
from serving.http.fanout import Patience
from serving.http.generate import Job, Style, reply, stream
from serving.http.models import resolve, unit_of
from serving.http.openapi import STREAMED
from serving.http.schemas import ChatBody, CompletionBody, GenerateBody
from serving.http.services import Services
from serving.http.sse import EventStream, unless_disconnected
from serving.http.styles import ChatStyle, CompletionStyle
from serving.tenancy.principal import Principal

_Prompt = str | tuple[int, ...] | tuple[ChatMessage, ...]

SPECIAL_TOKENS = 8
"""Tokens that a tokenizer may add to a prompt of text."""
MESSAGE_TOKENS = 16
"""Tokens that a chat template may add to each message."""


def generation_router(services: Services) -> APIRouter:
    """The routes that generate text."""
    limits = services.settings.limits
    router = APIRouter(route_class=services.route_class, tags=["generation"])

    @router.post("/v1/completions", response_model=None, responses=STREAMED)
    async def completions(body: CompletionBody, request: Request, caller: Infer) -> Response:
        """Continue a prompt, or several, each `n` times."""
        style = CompletionStyle(return_token_ids=bool(body.return_token_ids))
        return await answer(request, caller, body, body.prompts(), style, id_prefix="cmpl")

    @router.post("/v1/chat/completions", response_model=None, responses=STREAMED)
    async def chat(body: ChatBody, request: Request, caller: Infer) -> Response:
        """Answer a chat. `max_tokens` is by default whatever the context has left."""
        info = await services.backbone()
        if not info.has_chat_template:
            raise InvalidRequest(
                f"messages: the backbone {info.name!r} has no chat template.",
                param="messages",
                remedy="Use /v1/completions.",
            )
        messages = tuple(message.message() for message in body.messages)
        style = ChatStyle(return_token_ids=bool(body.return_token_ids))
        return await answer(request, caller, body, [messages], style, id_prefix="chatcmpl")

    async def answer(
        request: Request,
        caller: Principal,
        body: GenerateBody,
        prompts: Sequence[_Prompt],
        style: Style,
        *,
        id_prefix: str,
    ) -> Response:
        job = await plan(request, caller, body, prompts, id_prefix)
        if body.stream:
            return EventStream(lambda: streamed(request, caller, job, style), request.state.request_id)
        return JSONResponse(await unless_disconnected(request.receive, replied(request, caller, job, style)))

    def admitted(
        request: Request, caller: Principal, job: Job
    ) -> AbstractAsyncContextManager[Callable[[], Awaitable[None]]]:
        digest = job.calls[0].adapter_digest
        return services.admission.admitted(request, caller, job.id, adapter_digest=digest, usage=job.usage)

    async def replied(request: Request, caller: Principal, job: Job, style: Style) -> JsonObject:
        async with admitted(request, caller, job) as in_ledger:
            answer = await reply(services.backend, job, style, services.metrics)
            await in_ledger()
            return answer

    async def streamed(
        request: Request, caller: Principal, job: Job, style: Style
    ) -> AsyncGenerator[bytes, None]:
        async with (
            admitted(request, caller, job) as in_ledger,
            aclosing(stream(services.backend, job, style, services.metrics)) as events,
        ):
            async for event in events:
                await in_ledger()
                yield event

    async def plan(
        request: Request, caller: Principal, body: GenerateBody, prompts: Sequence[_Prompt], id_prefix: str
    ) -> Job:
        _within_limits(body, len(prompts), limits.max_n, limits.max_choices)
        info = await services.backbone()
        unit = unit_of(caller, user=body.user, request_id=request.state.request_id)
        target = await resolve(services, caller, body.model, unit=unit)
        set_adapter_digest(request, target.digest)
        # not the x-request-id: callers choose that, and two may choose the same
        job_id = f"{id_prefix}-{uuid.uuid4().hex}"
        samplings = [body.sampling(sample) for sample in range(body.num_calls)]
        calls = [
            GenerateCall(
                request_id=f"{job_id}-{place * body.num_calls + sample}",
                prompt=prompt,
                sampling=sampling,
                adapter_digest=target.digest,
                adapter_name=target.name,
                tenant=caller.tenant,
                weight=caller.limits.weight,
                service_class=caller.limits.service_class,
                streamed=bool(body.stream),
            )
            for place, prompt in enumerate(prompts)
            for sample, sampling in enumerate(samplings)
        ]
        return Job(
            id=job_id,
            model=body.model,
            calls=tuple(calls),
            usage=planned_usage(prompts, body.num_calls, body.num_rows, samplings[0].max_tokens, info),
            include_usage=body.include_usage,
            patience=Patience(limits.request_timeout_s, limits.first_token_timeout_s),
        )

    return router


def _within_limits(body: GenerateBody, num_prompts: int, max_n: int, max_choices: int) -> None:
    num_rows = body.num_rows
    if num_rows > max_n:
        name = "num_beams" if body.searches else "n"
        raise InvalidRequest(f"{name}: got {num_rows}, expected 1 to {max_n}.", param=name)
    if num_rows * num_prompts > max_choices:
        raise InvalidRequest(
            f"prompt: got {num_prompts} prompts times {num_rows}, expected at most {max_choices} choices.",
            param="prompt",
            remedy="Split the request.",
        )


def planned_usage(
    prompts: Sequence[_Prompt], num_calls: int, num_rows: int, max_tokens: int | None, info: BackboneInfo
) -> Usage:
    """What a request of so many calls and rows per prompt can come to at most.

    Text is only tokenised by the backend: here a byte counts as a token.

    A prompt whose template or normalisation makes more of it than that is charged for the rest at its end.
    """
    longest = info.max_model_len
    bounds = [min(_max_prompt_tokens(prompt), longest) for prompt in prompts]
    output = longest if max_tokens is None else min(max_tokens, longest)
    together = 2 * longest if info.reads_apart else longest
    reserved = sum(min(bound + output, together) + (num_rows - 1) * output for bound in bounds)
    return Usage(num_calls, bounds, reserved)


def _max_prompt_tokens(prompt: _Prompt) -> int:
    if isinstance(prompt, str):
        return len(prompt.encode()) + SPECIAL_TOKENS
    texts = [item.role + item.content for item in prompt if isinstance(item, ChatMessage)]
    if not texts:
        return len(prompt)
    return sum(len(text.encode()) + MESSAGE_TOKENS for text in texts) + SPECIAL_TOKENS
