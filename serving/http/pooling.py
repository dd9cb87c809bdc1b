"""The routes that a task head answers: embeddings, classification, tagging, reranking, questions about a text."""

from __future__ import annotations

import base64
import math
from dataclasses import replace

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from adapters.tasks import Task
from serving.core import Choice, Pooled, PoolingParams
from serving.http.access import Infer
from serving.http.entities import MAX_ANSWER_TOKENS, answers, entities
from serving.http.errors import JsonObject
from serving.http.generate import Job
from serving.http.heads import Asked, Heads
from serving.http.pooling_schemas import (
    ClassifyBody,
    EmbeddingsBody,
    FillMaskBody,
    QuestionBody,
    RerankBody,
    TokenClassifyBody,
)
from serving.http.services import Services

MULTI_LABEL_THRESHOLD = 0.5
DEFAULT_CHOICES = 5
"""Tokens for each mask where nobody says how many."""
CLASSIFICATION = PoolingParams(task=Task.SEQUENCE_CLASSIFICATION)


def pooling_router(services: Services) -> APIRouter:
    """The routes that a task head answers."""
    answer = Heads(services).answer
    router = APIRouter(route_class=services.route_class, tags=["pooling"])

    @router.post("/v1/embeddings", response_model=None)
    async def embeddings(body: EmbeddingsBody, request: Request, caller: Infer) -> Response:
        """A vector of each input: what the delta's head makes of it, else the normalised mean."""
        inputs = [Asked(item) for item in body.inputs()]
        asked_for = PoolingParams(task=Task.EMBEDDING, dimensions=body.dimensions)
        job, found = await answer(request, caller, body, asked_for, inputs, "embd")
        as_text = body.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(one.values).decode() if as_text else one.numbers(),
            }
            for index, one in enumerate(found)
        ]
        return reply(job, {"object": "list", "data": data, "model": body.model})

    @router.post("/v1/classify", response_model=None)
    async def classify(body: ClassifyBody, request: Request, caller: Infer) -> Response:
        """The label of each input, with the scores of all of them and of being out of distribution."""
        inputs = [Asked(*item) for item in body.pairs()]
        job, found = await answer(request, caller, body, CLASSIFICATION, inputs, "classify")
        data = [{"index": index, **_classified(one)} for index, one in enumerate(found)]
        return reply(job, {**job.head("list"), "data": data, "labels": list(found[0].labels)})

    @router.post("/v1/token_classify", response_model=None)
    async def token_classify(body: TokenClassifyBody, request: Request, caller: Infer) -> Response:
        """The entities of each input, with the characters that they stand at."""
        texts, strategy = body.inputs(), body.aggregation_strategy or "simple"
        inputs = [Asked(text) for text in texts]
        asked_for = PoolingParams(task=Task.TOKEN_CLASSIFICATION)
        job, found = await answer(request, caller, body, asked_for, inputs, "tag")
        data = [
            {"index": index, "entities": entities(text, one, strategy), "num_tokens": one.shape[0]}
            for index, (text, one) in enumerate(zip(texts, found, strict=True))
        ]
        return reply(job, {**job.head("list"), "data": data})

    @router.post("/v1/fill_mask", response_model=None)
    async def fill_mask(body: FillMaskBody, request: Request, caller: Infer) -> Response:
        """The likeliest tokens at each mask of each input."""
        inputs = [Asked(item) for item in body.inputs()]
        asked_for = PoolingParams(
            task=Task.FILL_MASK, top_k=body.top_k or DEFAULT_CHOICES, targets=tuple(body.targets or ())
        )
        job, found = await answer(request, caller, body, asked_for, inputs, "fill")
        data = [
            {"index": index, "masks": [[_chosen(c) for c in mask] for mask in one.masks]}
            for index, one in enumerate(found)
        ]
        return reply(job, {**job.head("list"), "data": data})

    @router.post("/v1/rerank", response_model=None)
    async def rerank(body: RerankBody, request: Request, caller: Infer) -> Response:
        """The documents by how well they fit the query, each read together with it by a head of one label."""
        inputs = [Asked(body.query, document) for document in body.documents]
        job, found = await answer(
            request, caller, body, replace(CLASSIFICATION, num_labels=1), inputs, "rerank"
        )
        results: list[JsonObject] = [
            {"index": index, "relevance_score": _sigmoid(one.numbers()[0])} for index, one in enumerate(found)
        ]
        if body.return_documents:
            for result in results:
                result["document"] = {"text": body.documents[result["index"]]}
        results.sort(key=lambda result: (-result["relevance_score"], result["index"]))
        return reply(job, {"id": job.id, "model": body.model, "results": results[: body.top_n]})

    @router.post("/v1/question_answer", response_model=None)
    async def question_answer(body: QuestionBody, request: Request, caller: Infer) -> Response:
        """The likeliest answers to a question, as spans of the context."""
        inputs = [Asked(body.question, body.context)]
        asked_for = PoolingParams(task=Task.QUESTION_ANSWERING)
        job, (found,) = await answer(request, caller, body, asked_for, inputs, "qa")
        spans = answers(
            body.context,
            found,
            count=body.top_n or 1,
            max_tokens=body.max_answer_tokens or MAX_ANSWER_TOKENS,
        )
        data = [
            {"answer": body.context[s.start : s.end], "score": s.score, "start": s.start, "end": s.end}
            for s in spans
        ]
        return reply(job, {**job.head("list"), "data": data})

    return router


def reply(job: Job, body: JsonObject) -> JSONResponse:
    """`body` with what the request came to."""
    return JSONResponse({**body, "usage": job.usage.body()})


def _classified(pooled: Pooled) -> JsonObject:
    """`label`: the likeliest; of several labels, `predicted` are all that apply; of a regression, its only one."""
    logits, probs = pooled.numbers(), pooled.probabilities()
    best = max(range(len(logits)), key=logits.__getitem__)
    predicted = {}
    if pooled.problem_type == "multi_label" and probs is not None:
        chosen = [
            label for label, prob in zip(pooled.labels, probs, strict=True) if prob >= MULTI_LABEL_THRESHOLD
        ]
        predicted = {"predicted": chosen}
    alone = len(logits) == 1
    return {
        "label": pooled.labels[best] if probs is not None or alone else None,
        "probs": probs,
        "num_classes": len(logits),
        "logits": logits,
        "ood": dict(pooled.ood),
        **predicted,
    }


def _chosen(choice: Choice) -> JsonObject:
    return {"token": choice.token_id, "token_str": choice.text, "score": choice.probability}


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))
