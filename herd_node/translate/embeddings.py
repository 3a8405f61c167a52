"""/api/embed and the older /api/embeddings on llama-server's /v1/embeddings. Pure."""

from __future__ import annotations

import math
from abc import abstractmethod

import orjson

from herd_node.translate.base import JSON, Answer, Call, ModelFacts, Reader, Refusal
from herd_node.translate.errors import error_answer
from herd_node.translate.fields import Fields
from herd_node.translate.moments import keep_alive_s, nanoseconds
from herd_node.translate.options import sampling_fields

EMBEDDINGS_PATH = "/v1/embeddings"

Vector = list[float]


def translate_embed(fields: Fields, facts: ModelFacts) -> Call | Answer:
    asked = fields.text("model")
    if not asked:
        raise Refusal(404, "model '' not found")
    unload = _check_common(fields, facts)
    fields.flag("truncate")
    dimensions = fields.whole_number("dimensions")
    inputs = _inputs(fields.values.get("input"))
    if not inputs:
        return _nothing({"model": asked, "embeddings": []}, unload)
    return _call(inputs, facts, EmbedReader(asked, dimensions), unload)


def translate_embeddings(fields: Fields, facts: ModelFacts) -> Call | Answer:
    asked = fields.text("model")
    if not asked:
        raise Refusal(400, "model is required")
    unload = _check_common(fields, facts)
    prompt = fields.text("prompt")
    if not prompt:
        return _nothing({"embedding": []}, unload)
    return _call([prompt], facts, EmbeddingReader(), unload)


def _check_common(fields: Fields, facts: ModelFacts) -> bool:
    """Whether the model is to be unloaded afterwards."""
    sampling_fields(fields.mapping("options", "map[string]interface {}"), facts)
    return keep_alive_s(fields.values.get("keep_alive")) == 0 and facts.unloads


def _nothing(answer: dict[str, object], unload: bool) -> Answer:
    return Answer(status=200, body=orjson.dumps(answer), content_type=JSON, unload=unload)


def _inputs(value: object) -> list[str]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise Refusal(400, "invalid input type")
    return value


def _call(inputs: list[str], facts: ModelFacts, reader: Reader, unload: bool) -> Call:
    fields = {"model": facts.upstream_id, "input": inputs, "encoding_format": "float"}
    body = orjson.dumps(fields)
    return Call(path=EMBEDDINGS_PATH, body=body, stream=False, sse=False, reader=reader, unload=unload)


class _WholeReader(Reader):
    """For answers that are one body: there are no events to feed."""

    def feed(self, payload: bytes, *, wall_s: float, elapsed_s: float) -> bytes:
        return b""

    def end(self, *, elapsed_s: float, wall_s: float) -> bytes:
        return b""

    def whole(self, status: int, body: bytes, *, elapsed_s: float) -> tuple[int, bytes]:
        if status != 200:
            return error_answer(status, body, EMBEDDINGS_PATH)
        vectors, prompt_tokens = _vectors(body)
        if not vectors:
            return 502, orjson.dumps({"error": "the backend answered without embeddings"})
        self.content_started = True
        return 200, orjson.dumps(self._answer(vectors, prompt_tokens, elapsed_s))

    @abstractmethod
    def _answer(self, vectors: list[Vector], prompt_tokens: int, elapsed_s: float) -> dict[str, object]: ...


class EmbedReader(_WholeReader):
    """/api/embed: L2-normalised vectors, cut to `dimensions` if that is smaller."""

    def __init__(self, model: str, dimensions: int) -> None:
        super().__init__()
        self._model = model
        self._dimensions = dimensions

    def _answer(self, vectors: list[Vector], prompt_tokens: int, elapsed_s: float) -> dict[str, object]:
        counters = {
            "total_duration": nanoseconds(self.load_s + elapsed_s),
            "load_duration": nanoseconds(self.load_s),
            "prompt_eval_count": prompt_tokens,
        }
        return {
            "model": self._model,
            "embeddings": [self._cut(vector) for vector in vectors],
            **{name: value for name, value in counters.items() if value},
        }

    def _cut(self, vector: Vector) -> Vector:
        if not 0 < self._dimensions < len(vector):
            return vector  # llama-server has normalised it
        head = vector[: self._dimensions]
        length = math.sqrt(math.fsum(x * x for x in head))
        return [x / length for x in head] if length else head


class EmbeddingReader(_WholeReader):
    """/api/embeddings: the one vector and nothing else."""

    def _answer(self, vectors: list[Vector], prompt_tokens: int, elapsed_s: float) -> dict[str, object]:
        return {"embedding": vectors[0]}


def _vectors(body: bytes) -> tuple[list[Vector], int]:
    """The vectors in the order of the inputs, and the prompt tokens; no vectors if the body is none."""
    try:
        answer = orjson.loads(body)
        rows = sorted(answer["data"], key=lambda row: row["index"])
        return [row["embedding"] for row in rows], int(answer["usage"]["prompt_tokens"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return [], 0
