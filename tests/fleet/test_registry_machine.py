"""The registry under any sequence of beats, probes, failures and attempts."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from herd.fleet.book import DEFAULT_SLOTS
from herd.fleet.registry import AttemptResult, Registry
from herd.fleet.snapshot import INSTANCE_FIXED, NODE_FIXED, listing_of
from herd_node.protocol import wire
from tests.fleet.build import HOST, OLLAMA, beat, marks, model

NODES = ("attic", "den")
WEIGHTS = ("w1", "w2")
STATES = ("hot", "loading", "warm", "cold")
node_ids = st.sampled_from(NODES)


class RegistryMachine(RuleBasedStateMachine):
    """The model beside it is as plain as can be: sets of tokens, and what was proven by a probe."""

    @initialize()
    def make(self):
        self.now_s = 0.0
        self.registry = Registry(router_id="router")
        self.boot = dict.fromkeys(NODES, 0)
        self.known: set[str] = set()
        self.proven: set[str] = set()
        self.live: dict[str, tuple[object, str, str]] = {}
        self.settling: dict[tuple[str, str], list[float]] = {}
        self.seq = 0
        self.before = self.registry.snapshot(0.0)
        self.touched: set[str] = set()

    # ---- the world ----

    def tell(self, node_id, models, draining=False, host=HOST):
        hb = beat(
            node_id,
            *models,
            agent_id=node_id[0] * 16,
            boot=f"{self.boot[node_id]:016x}",
            draining=draining,
            gateway=wire.Gateway(port=11436, addresses=(HOST,)),
        )
        outcome = self.registry.on_beat(hb, host, self.now_s)
        assert not outcome.conflict
        self.known.add(node_id)
        self.touched.add(node_id)
        return outcome

    @rule(
        node_id=node_ids,
        states=st.lists(st.sampled_from((*STATES, None)), min_size=2, max_size=2),
        draining=st.booleans(),
    )
    def beats(self, node_id, states, draining):
        models = [
            model(f"m-{w}", s, weights=w) for w, s in zip(WEIGHTS, states, strict=True) if s is not None
        ]
        outcome = self.tell(node_id, models, draining=draining and self.now_s > 60)
        if outcome.reply_state == "online":
            assert node_id in self.proven

    @rule(node_id=node_ids)
    def relayed(self, node_id):
        outcome = self.tell(node_id, [], host="10.9.9.9")
        self.proven.discard(node_id)
        assert outcome.reply_state == "unreachable"

    @rule(node_id=node_ids)
    def restarts(self, node_id):
        self.boot[node_id] += 1
        self.proven.discard(node_id)
        self.tell(node_id, [model("m-w1", weights="w1")])

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def fails_to_connect(self, data):
        node_id = data.draw(st.sampled_from(sorted(self.known)))
        self.registry.on_connect_failed(node_id, self.now_s, "refused")
        self.proven.discard(node_id)
        self.touched.add(node_id)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def refuses_a_call(self, data):
        node_id = data.draw(st.sampled_from(sorted(self.known)))
        self.registry.on_stale_auth(node_id, self.now_s)
        self.touched.add(node_id)
        assert self.registry.snapshot(self.now_s).nodes[node_id].status in ("offline", "draining")

    @rule(ok=st.booleans())
    def probes(self, ok):
        for target in self.registry.probes_due(self.now_s):
            self.registry.on_probe(target.node_id, ok, self.now_s, target=target)
            self.touched.add(target.node_id)
            if ok:
                self.proven.add(target.node_id)

    @rule(seconds=st.sampled_from((0.1, 1.0, 4.0, 20.0)))
    def time_passes(self, seconds):
        self.now_s += seconds
        self.registry.sweep(self.now_s)
        self.touched |= self.known

    # ---- attempts ----

    @precondition(lambda self: self.known)
    @rule(
        data=st.data(), weights=st.sampled_from(WEIGHTS), prompt=st.lists(st.sampled_from("ab"), max_size=3)
    )
    def starts(self, data, weights, prompt):
        node_id = data.draw(st.sampled_from(sorted(self.known)))
        key = f"{OLLAMA}|{weights}"
        if key not in {one.key for one in self.registry.snapshot(self.now_s).nodes[node_id].instances}:
            return
        self.seq += 1
        request_id = f"q{self.seq}"
        token = self.registry.start_attempt(
            node_id, key, request_id, f"m-{weights}", 0.5, 10.0, marks(*prompt), self.now_s
        )
        self.live[request_id] = (token, node_id, key)
        self.touched.add(node_id)
        assert self.registry.instance(node_id, key).state in ("hot", "loading")

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def first_record(self, data):
        token, node_id, key = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        self.registry.first_record(token, self.now_s)
        self.touched.add(node_id)
        assert self.registry.instance(node_id, key).state == "hot"

    @precondition(lambda self: self.live)
    @rule(
        data=st.data(),
        ok=st.booleans(),
        cancelled=st.booleans(),
        settle_s=st.sampled_from((0.0, 2.5)),
        again=st.booleans(),
        tokens=st.integers(0, 500),
    )
    def ends(self, data, ok, cancelled, settle_s, again, tokens):
        request_id = data.draw(st.sampled_from(sorted(self.live)))
        token, node_id, key = self.live.pop(request_id)
        result = AttemptResult(
            ok=ok and not cancelled,
            cancelled=cancelled,
            settle_s=settle_s,
            total_s=1.0,
            ttft_s=0.5,
            prompt_tokens=tokens,
            completion_tokens=tokens,
        )
        for _ in range(1 + again):
            self.registry.end_attempt(token, self.now_s, result)
        if cancelled and settle_s:
            self.settling.setdefault((node_id, key), []).append(self.now_s + settle_s)
        self.touched.add(node_id)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), weights=st.sampled_from(WEIGHTS))
    def marks_and_delists(self, data, weights):
        node_id = data.draw(st.sampled_from(sorted(self.known)))
        self.registry.mark_busy(node_id, f"{OLLAMA}|{weights}", self.now_s + 2.0)
        self.registry.delist(node_id, f"m-{weights}")
        self.touched.add(node_id)

    # ---- what must hold ----

    @invariant()
    def slots_are_exactly_the_attempts_that_live(self):
        snapshot = self.registry.snapshot(self.now_s)
        running = {
            (node.node_id, one.key, each.request_id)
            for node in snapshot.nodes.values()
            for one in node.instances
            for each in one.running
        }
        assert running == {(node_id, key, request_id) for request_id, (_, node_id, key) in self.live.items()}
        rows = {row.node_id: row.in_flight for row in self.registry.nodes_for_status(self.now_s)}
        assert rows == {
            node_id: sum(n == node_id for _, n, _ in self.live.values()) for node_id in self.known
        }

    @invariant()
    def slots_settle_in_time_and_never_longer_than_told(self):
        for node in self.registry.snapshot(self.now_s).nodes.values():
            for one in node.instances:
                told = self.settling.get((node.node_id, one.key), [])
                assert all(until_s > self.now_s and until_s in told for until_s in one.settling_until_s)
                assert len(one.settling_until_s) == sum(until_s > self.now_s for until_s in told)

    @invariant()
    def only_a_probe_makes_a_node_sendable(self):
        for node in self.registry.snapshot(self.now_s).nodes.values():
            if node.status in ("online", "degraded"):
                assert node.node_id in self.proven
            else:
                assert node.reason

    @invariant()
    def only_touched_nodes_get_new_views(self):
        snapshot = self.registry.snapshot(self.now_s)
        for node_id, view in self.before.nodes.items():
            assert snapshot.nodes[node_id] is view or node_id in self.touched
        assert self.registry.snapshot(self.now_s) is snapshot
        worked = snapshot.worked
        if worked is not None and worked[0] is self.before.nodes:
            assert worked[1] is snapshot.nodes
            for node_id, view in self.before.nodes.items():
                now = snapshot.nodes[node_id]
                assert now is view or node_id in worked[2]
                assert now[:NODE_FIXED] == view[:NODE_FIXED]
                assert [one[:INSTANCE_FIXED] for one in now.instances] == [
                    one[:INSTANCE_FIXED] for one in view.instances
                ]
        self.before, self.touched = snapshot, set()

    @invariant()
    def holders_are_the_nodes_own_views(self):
        snapshot = self.registry.snapshot(self.now_s)
        listed = {
            (name.canonical, node.node_id, one.key)
            for node in snapshot.nodes.values()
            for one in node.instances
            for name in one.names
        }
        held = {
            (name, node.node_id, one.key) for name, pairs in snapshot.holders.items() for node, one in pairs
        }
        assert held == listed
        for pairs in snapshot.holders.values():
            for node, one in pairs:
                assert snapshot.nodes[node.node_id] is node
                assert any(each is one for each in node.instances)

    @invariant()
    def what_is_kept_is_what_would_be_made_from_nothing(self):
        registry, snapshot = self.registry, self.registry.snapshot(self.now_s)
        plain = listing_of(snapshot.nodes.values())
        assert {model: set(places) for model, places in snapshot.listing.items()} == {
            model: set(places) for model, places in plain.items()
        }
        assert snapshot.any_online == any(
            view.status in ("online", "degraded") for view in snapshot.nodes.values()
        )
        assert snapshot.stats == registry._stats
        for node_id, node in registry._nodes.items():
            made = {one.key: one._make_view(DEFAULT_SLOTS) for one in node.instances.values()}
            seen = snapshot.nodes[node_id].instances
            assert seen == tuple(one for one in made.values() if one.names or one.taken)
            assert snapshot.nodes[node_id] == node._make_view(DEFAULT_SLOTS)

    @invariant()
    def work_means_a_model_that_is_hot_or_loading(self):
        for node in self.registry.snapshot(self.now_s).nodes.values():
            for one in node.instances:
                assert not one.running or one.state in ("hot", "loading")
                assert one.slots >= 1
                own = self.registry._nodes[node.node_id].instances[one.key]
                assert len(own.prompts.sequences) <= 2
                assert (one.loading_since_s is not None) == (one.state == "loading")


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
