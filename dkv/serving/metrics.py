"""What a server counts, in the form that Prometheus reads."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from dkv.serving.request import FINISHED
from dkv.serving.worker import Job, Told, Worker

# Upper ends of the classes of times, in seconds, and of rates, in tokens a second.
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
RATES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)


class Metrics:
    """Counts of one server; all of them are of numbers, none of a text.

    Args:
        worker: whose load is told when it is asked for.
    """

    kind = CONTENT_TYPE_LATEST

    def __init__(self, worker: Worker):
        self._worker, self._registry = worker, CollectorRegistry()
        own = {"namespace": "dkv", "registry": self._registry}
        self._choices = Counter("choices", "Answers asked for that have ended, by how.", ["state"], **own)
        self._responses = Counter("http_responses", "Responses by route and status.", ["route", "status"], **own)
        self._read = Counter("prompt_tokens", "Tokens of prompts that had a row.", **own)
        self._written = Counter("generated_tokens", "Tokens of finished answers.", **own)
        times = {"buckets": SECONDS, **own}
        self._queued = Histogram("queue_seconds", "From the arrival of a prompt to its row.", **times)
        self._first = Histogram("first_token_seconds", "From the arrival of a prompt to its first token.", **times)
        self._whole = Histogram("answer_seconds", "From the arrival of a prompt to its whole answer.", **times)
        self._rate = Histogram("tokens_per_second", "New tokens by the time with a row.", buckets=RATES, **own)
        self._registry.register(self)

    def collect(self) -> list[GaugeMetricFamily]:
        """The load of this moment."""
        llm = self._worker.llm
        told = {
            "rows": ("Answers that can be worked on at a time.", llm.rows),
            "rows_busy": ("Answers that are worked on.", llm.running),
            "open": ("Answers asked for that have not ended.", self._worker.open),
            "room": ("Answers that may be open.", self._worker.room),
        }
        return [GaugeMetricFamily(f"dkv_{name}", about, value) for name, (about, value) in told.items()]

    def note_end(self, job: Job, told: Told) -> None:
        """An answer has ended; called on the worker's thread."""
        self._choices.labels(told.state).inc()
        if job.request is None or job.request.stats.started is None:
            return
        stats = job.request.stats
        self._read.inc(len(job.input_ids))
        self._queued.observe(stats.queued_seconds)
        if stats.first_token_seconds is not None:
            self._first.observe(stats.first_token_seconds)
        if told.state == FINISHED:
            self._written.inc(stats.new_tokens)
            self._whole.observe(stats.seconds)
            self._rate.observe(stats.tokens_per_second)

    def note_response(self, route: str, status: int) -> None:
        """A response has begun; `route` is one of the server's own, so that clients cannot make new names."""
        self._responses.labels(route, status).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
