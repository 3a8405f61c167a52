"""Slots: attempts that start, answer, end and settle; what they teach; and what a node said instead.

A slot is a live attempt in a set; counts are `len()`, never arithmetic. Called for every request, so what is
done here is done in few steps: views, events and statistics are put together when somebody looks.
"""

from __future__ import annotations

from collections.abc import Iterable

from herd.fleet.attempt import AttemptResult, AttemptToken, sample
from herd.fleet.book import Book
from herd.fleet.events import AttemptEnded, AttemptFirstRecord, AttemptStarted, ModelChanged
from herd.fleet.instance import Instance
from herd.fleet.record import Node
from herd.fleet.snapshot import Running
from herd.request import PrefixMark
from herd_node.protocol.names import canonical


class Attempts(Book):
    def start_attempt(
        self,
        node_id: str,
        instance_key: str,
        request_id: str,
        model: str,
        prefill_s: float,
        out_tokens: float,
        prefixes: tuple[PrefixMark, ...],
        now_s: float,
    ) -> AttemptToken:
        """Take a slot. Whether one is free is the planner's business; KeyError: the instance is not known."""
        node = self._nodes[node_id]
        instance = node.instances[instance_key]
        running = tuple.__new__(Running, (request_id, model, now_s, None, prefill_s, out_tokens))
        token = AttemptToken(node, instance, running, prefixes)
        instance.start(token, running, prefixes, instance.loaded_slots(self._slots_default))
        node.attempts.add(token)
        # nothing settles anywhere while nothing is due
        if len(node.attempts) > 1 or (self._due and node.settling()):
            node.company += 1
        node.last_chosen_s = now_s
        node.count_busy(now_s)
        self._last_sent_s[model] = now_s
        if instance.state != token.was:
            self._changed_state(node, instance)
        else:
            self._worked(node, instance)
        self._events.append((AttemptStarted, node_id, instance_key, request_id))
        return token

    def reload(self, node_id: str, instance_key: str, context_tokens: int | None, now_s: float) -> None:
        """The next attempt there makes the backend load a hot model anew: it is not hot until it answers."""
        node = self._nodes[node_id]
        instance = node.instances[instance_key]
        instance.reloads(context_tokens, now_s)
        self._changed_state(node, instance)

    def evict(self, node_id: str, instance_keys: Iterable[str], now_s: float) -> None:
        """A load that was just started pushes these out: they are warm before a beat can say so."""
        node = self._nodes[node_id]
        for key in instance_keys:
            instance = node.instances.get(key)
            if instance is not None and instance.evicted(now_s):
                self._changed_state(node, instance)

    def first_record(self, token: AttemptToken, now_s: float) -> None:
        """The first content record came: the model is hot, whatever the last beat said."""
        request_id, model, started_s, first_s, prefill_s, out_tokens = token.running
        if token.ended or first_s is not None:
            return
        node, instance = token.node, token.instance
        running = tuple.__new__(Running, (request_id, model, started_s, now_s, prefill_s, out_tokens))
        token.running = instance.running[token] = running
        if instance.proved_hot(now_s):
            self._changed_state(node, instance)
        else:
            self._worked(node, instance)
        self._events.append((AttemptFirstRecord, node.node_id, instance.key, request_id))

    def end_attempt(self, token: AttemptToken, now_s: float, outcome: AttemptResult) -> None:
        """Give the slot back, or let it settle, and learn from what happened. A second end does nothing."""
        if token.ended:
            return
        token.ended = True
        node, instance = token.node, token.instance
        del instance.running[token]
        node.attempts.remove(token)
        node.count_busy(now_s)
        instance.last_used_s = now_s
        settling = outcome.cancelled and outcome.settle_s > 0
        if settling:
            instance.settling[token] = (now_s, now_s + outcome.settle_s)
            self._remind(now_s + outcome.settle_s, instance)
        if outcome.ok:
            if instance.proved_hot(now_s):
                self._changed_state(node, instance)
            self._learn(token, outcome)
        elif not outcome.cancelled and token.running.first_record_s is None:
            self._never_began(token, now_s)
        self._worked(node, instance)
        if not instance.listed:
            self._drop_if_gone(node, instance)
        ended = (AttemptEnded, node.node_id, instance.key, token.running.request_id, outcome.ok, settling)
        self._events.append(ended)

    def abandon_attempt(self, token: AttemptToken, now_s: float) -> None:
        """The slot was taken, and then nothing was sent."""
        self.end_attempt(token, now_s, AttemptResult(ok=False))

    def settled(self, node_id: str, instance_key: str, now_s: float) -> None:
        """The backend shows its slots idle: what settles there has settled."""
        node = self._nodes[node_id]
        instance = node.instances.get(instance_key)
        if instance is not None and instance.settling:
            self._settle(node, instance, now_s)

    def _settle(self, node: Node, instance: Instance, since_s: float) -> None:
        """Free the slots that have been settling since `since_s` or longer."""
        ended = [token for token, (from_s, _) in instance.settling.items() if from_s <= since_s]
        for token in ended:
            del instance.settling[token]
        if ended:
            self._freed(node, instance)

    def _changed_state(self, node: Node, instance: Instance) -> None:
        self._touch(node, instance)
        self._events.append((ModelChanged, node.node_id, instance.key, instance.state))

    def _never_began(self, token: AttemptToken, now_s: float) -> None:
        node, instance = token.node, token.instance
        instance.forget_sequence(token.prefixes)
        if instance.load_failed(now_s):
            self._changed_state(node, instance)

    # ---- learning -----------------------------------------------------------------------------------------

    def _learn(self, token: AttemptToken, outcome: AttemptResult) -> None:
        instance, model = token.instance, token.running.model
        est_tokens = outcome.est_tokens or (token.prefixes[-1].tokens if token.prefixes else 0.0)
        out_tokens, prompt_tokens = outcome.completion_tokens or 0, outcome.prompt_tokens or 0
        stats = self.rates.learn_answer(model, out_tokens, prompt_tokens, est_tokens)
        if stats is not None and self._stats.get(model) is not stats:
            self._learned(model, stats)
        if outcome.timed and token.alone:
            node_id, key, guess = instance.node_id, instance.facts.rates_key, instance.guess
            if self.rates.learn(node_id, key, sample(token, outcome), guess):
                instance.rates = self.rates.rates(node_id, key, guess)

    # ---- marks --------------------------------------------------------------------------------------------

    def mark_busy(self, node_id: str, instance_key: str, until_s: float) -> None:
        """The node itself said busy: not sent to before `until_s`."""
        instance = self._nodes[node_id].instances.get(instance_key)
        if instance is not None:
            instance.busy_until_s = max(instance.busy_until_s, until_s)
            self._marked(instance, until_s)

    def mark_bad(self, node_id: str, instance_key: str, until_s: float) -> None:
        """It could not be loaded there: not tried again before `until_s`."""
        instance = self._nodes[node_id].instances.get(instance_key)
        if instance is not None:
            instance.bad_until_s = max(instance.bad_until_s, until_s)
            self._marked(instance, until_s)

    def _marked(self, instance: Instance, until_s: float) -> None:
        self._remind(until_s, instance)
        self._touch(self._nodes[instance.node_id], instance)

    def delist(self, node_id: str, model: str) -> None:
        """The node says it has no such model (404): believed until its next beat."""
        node, name = self._nodes[node_id], canonical(model)
        for instance in node.instances.values():
            if any(shown.canonical == name for shown in instance.shown_names()):
                instance.delisted |= {name}
                self._touch(node, instance)
                self._events.append((ModelChanged, node_id, instance.key, instance.state))
