"""Serve's request router over `ranking.rank`: a thin adapter, because the interface below it is alpha."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from serving.deployments.ranking import rank


class DeltaRouter(RequestRouter):  # type: ignore[misc]  # Ray has no types
    """Requests of one delta go to one replica while it keeps up.

    The key is what the caller put in `multiplexed_model_id` (a delta's digest, or a request's id for the bare
    backbone); calls without one are spread. Serve's FIFO mixin must stay out: it would hand a replica that was
    chosen for one request to another.
    """

    def initialize_state(self, max_gap: int) -> None:
        """Serve's constructor for our arguments (`request_router_kwargs`)."""
        self._max_gap = max_gap
        # Own counts, from the choice to the end: in throughput mode all requests of a burst are ranked before
        # the first one is sent, and Serve's queue-length cache counts too much with gRPC.
        self._placed: dict[str, ReplicaID] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Every candidate in the order of `rank`, one at a time, so that a full one is passed over."""
        if pending_request is None:
            return [list(candidate_replicas)]
        pending_request.routing_context.should_backoff = True  # else a busy loop while all are full
        request_id = pending_request.metadata.internal_request_id
        self._placed.pop(request_id, None)  # chosen before, and refused
        counts = Counter(self._placed.values())
        members = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        order = rank(
            pending_request.metadata.multiplexed_model_id or request_id,
            {member: counts[replica.replica_id] for member, replica in members.items()},
            max_gap=self._max_gap,
        )
        if order:
            self._placed[request_id] = members[order[0]].replica_id
            pending_request.future.add_done_callback(lambda routed: self._forget(request_id, routed))
        return [[members[member]] for member in order]

    def _forget(self, request_id: str, routed: Any) -> None:
        if routed.cancelled():  # the caller went away while it waited
            self._placed.pop(request_id, None)

    def on_request_routed(
        self,
        pending_request: PendingRequest,
        replica_id: ReplicaID,
        result: ReplicaResult,  # noqa: ARG002  (Serve's signature)
    ) -> None:
        """Serve's word that `replica_id` took the request."""
        self._placed[pending_request.metadata.internal_request_id] = replica_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:  # noqa: ARG002
        """Serve's word that the request has ended, however."""
        self._placed.pop(internal_request_id, None)
