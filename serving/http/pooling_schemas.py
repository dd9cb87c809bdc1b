"""The wire models of requests that a task head answers; as strict as those in `schemas`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from adapters.errors import InvalidRequest
from serving.http.schemas import MAX_REFERENCE_CHARS, Prompt, RequestBody, Texts, shaped

TextOrTexts = Annotated[str | Texts, shaped("a string or a list of strings")]
Strategy = Literal["none", "simple", "first"]


class PoolingBody(RequestBody):
    """What all of them share. `truncate_prompt_tokens`: keep so many tokens at most, -1 for as many as fit."""

    model: str = Field(min_length=1, max_length=MAX_REFERENCE_CHARS)
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    user: str | None = None


class InputBody(PoolingBody):
    """A body with texts, or token ids, each of which gets an answer."""

    input: Prompt

    def inputs(self) -> list[str | tuple[int, ...]]:
        """Every input, one entry each. Raises InvalidRequest for none at all."""
        if isinstance(self.input, str):
            return [self.input]
        if not self.input:
            raise InvalidRequest("input: got an empty list.", param="input", remedy="Send at least one text.")
        if isinstance(self.input[0], int):
            return [tuple(self.input)]
        return [item if isinstance(item, str) else tuple(item) for item in self.input]


class EmbeddingsBody(InputBody):
    """The body of `POST /v1/embeddings`."""

    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None


class ClassifyBody(InputBody):
    """The body of `POST /v1/classify`. `text_pair`: the second text of each input, for heads of two texts."""

    text_pair: TextOrTexts | None = None

    def pairs(self) -> list[tuple[str | tuple[int, ...], str | None]]:
        """Every input with its second text. Raises InvalidRequest where there are not as many, or for token ids."""
        first = self.inputs()
        if self.text_pair is None:
            return [(item, None) for item in first]
        second = [self.text_pair] if isinstance(self.text_pair, str) else self.text_pair
        if len(second) != len(first) or not all(isinstance(item, str) for item in first):
            raise InvalidRequest(
                f"text_pair: got {len(second)} texts for {len(first)} inputs, which must be texts too.",
                param="text_pair",
                remedy="Send one for each input.",
            )
        return list(zip(first, second, strict=True))


class TokenClassifyBody(PoolingBody):
    """The body of `POST /v1/token_classify`."""

    input: TextOrTexts
    aggregation_strategy: Strategy | None = None

    def inputs(self) -> list[str]:
        """Every text. Raises InvalidRequest for none at all."""
        if not self.input:
            raise InvalidRequest("input: it is empty.", param="input", remedy="Send at least one text.")
        return [self.input] if isinstance(self.input, str) else list(self.input)


class FillMaskBody(InputBody):
    """The body of `POST /v1/fill_mask`. `targets`: the only tokens that may be chosen."""

    top_k: Annotated[int, Field(ge=1, le=100)] | None = None
    targets: Annotated[Texts, Field(min_length=1)] | None = None


class RerankBody(PoolingBody):
    """The body of `POST /v1/rerank`."""

    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[Texts, Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None


class QuestionBody(PoolingBody):
    """The body of `POST /v1/question_answer`."""

    question: Annotated[str, Field(min_length=1)]
    context: Annotated[str, Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1, le=20)] | None = None
    max_answer_tokens: Annotated[int, Field(ge=1)] | None = None
