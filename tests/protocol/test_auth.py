import base64
import contextlib
import hashlib
import hmac
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from herd_node.protocol import auth
from herd_node.protocol.auth import (
    AuthError,
    AuthHeader,
    BeatGate,
    CallGate,
    CallHeads,
    Refusal,
    SeqWindow,
    Signer,
    Token,
    TokenError,
    body_hash,
    key_id,
    mac_ok,
    node_key,
    parse_auth,
    parse_token,
    render_token,
    sign,
    split_key_id,
)

quick = settings(deadline=None, max_examples=100)

SECRET = bytes(range(32))
ATTIC = "attic/00000000000000aa"
AGENT_BOOT = "00000000000000bb"
ROUTER_BOOT = "00000000000000cc"

# Made with `openssl dgst -sha256 -mac HMAC`, not with the code under test.
ATTIC_KEY = "fd1ed2274003dcda1a1846aa7343f5df034ef3acb3748b736387c2cb7a4a4893"
HASH_OF_BRACES = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
MAC_OF_FIRST_BEAT = "5f8d0f362357da8c09c564473fd122c0ab95536ee4f306f3a624d673a9b88c8f"
FIRST_BEAT = f"1 {ATTIC} {AGENT_BOOT} - 7 {HASH_OF_BRACES} {MAC_OF_FIRST_BEAT}"

ELEMENTS = {
    "direction": "call",
    "method": "POST",
    "target": "/api/chat?x=1",
    "key_id": ATTIC,
    "sender_boot": ROUTER_BOOT,
    "receiver_boot": AGENT_BOOT,
    "seq": 12,
    "body_sha256": body_hash(b"{}"),
}
OTHER = {
    "direction": "reply",
    "method": "GET",
    "target": "/api/chat?x=2",
    "key_id": "attic/00000000000000ab",
    "sender_boot": "00000000000000cd",
    "receiver_boot": None,
    "seq": 13,
    "body_sha256": body_hash(b"{ }"),
}


# --- signature


@quick
@given(bodies=st.lists(st.binary(max_size=4096), max_size=5))
def test_a_body_has_the_hash_of_its_own_bytes_whatever_was_hashed_before(bodies: list[bytes]):
    for body in bodies:
        assert body_hash(body) == hashlib.sha256(body).hexdigest()


def test_the_signature_is_the_one_that_another_program_computes():
    key = node_key(SECRET, ATTIC)
    assert key.hex() == ATTIC_KEY
    assert body_hash(b"{}") == HASH_OF_BRACES
    signed = sign(
        key,
        direction="beat",
        method="POST",
        target="/heartbeat",
        key_id=ATTIC,
        sender_boot=AGENT_BOOT,
        receiver_boot=None,
        seq=7,
        body_sha256=HASH_OF_BRACES,
    )
    assert signed == FIRST_BEAT
    assert mac_ok(key, parse_auth(FIRST_BEAT), direction="beat", method="POST", target="/heartbeat")


def test_a_header_reads_as_it_was_written():
    assert parse_auth(FIRST_BEAT) == AuthHeader(ATTIC, AGENT_BOOT, None, 7, HASH_OF_BRACES, MAC_OF_FIRST_BEAT)
    assert parse_auth(sign(SECRET, **ELEMENTS)).receiver_boot == AGENT_BOOT


@pytest.mark.parametrize("element", ELEMENTS)
def test_every_signed_element_changes_the_mac(element):
    changed = ELEMENTS | {element: OTHER[element]}
    assert parse_auth(sign(SECRET, **changed)).mac != parse_auth(sign(SECRET, **ELEMENTS)).mac


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_mac_does_not_fit_another_message(element):
    context = {name: ELEMENTS[name] for name in ("direction", "method", "target")}
    header = parse_auth(sign(SECRET, **ELEMENTS))
    assert mac_ok(SECRET, header, **context)
    if element in context:
        assert not mac_ok(SECRET, header, **(context | {element: OTHER[element]}))
    else:
        assert not mac_ok(SECRET, header._replace(**{element: OTHER[element]}), **context)


def test_another_key_makes_another_mac():
    header = parse_auth(sign(SECRET, **ELEMENTS))
    assert not mac_ok(SECRET[::-1], header, direction="call", method="POST", target="/api/chat?x=1")
    assert (
        node_key(SECRET, ATTIC) != node_key(SECRET, "attic/00000000000000ab") != node_key(SECRET[::-1], ATTIC)
    )


@quick
@given(st.binary(max_size=200), st.integers(1, auth.MAX_SEQ), st.binary(max_size=40))
def test_the_mac_is_that_of_the_standard_library(key, seq, body):
    signer = Signer(key, **{name: ELEMENTS[name] for name in list(ELEMENTS)[:6]})
    text = f"herd1\ncall\nPOST\n/api/chat?x=1\n{ATTIC}\n{ROUTER_BOOT}\n{AGENT_BOOT}\n{seq}\n{body_hash(body)}"
    for _ in range(2):  # a signer is used again and again
        assert signer.mac(seq, body_hash(body)) == hmac.digest(key, text.encode(), "sha256").hex()


def only_attic(key_id):
    return SECRET if key_id == ATTIC else None


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_remembered_call_is_checked_as_strictly_as_the_first(element):
    heads = CallHeads(only_attic)
    good = sign(SECRET, **ELEMENTS)
    for _ in range(3):
        assert heads.read(good, "POST", "/api/chat?x=1") == (parse_auth(good), SECRET)
    assert heads.read(good, "GET", "/api/chat?x=1") is None
    assert heads.read(good, "POST", "/api/chat?x=2") is None
    front, _, mac = good.rpartition(" ")
    other_front = sign(SECRET, **(ELEMENTS | {element: OTHER[element]})).rpartition(" ")[0]
    read = heads.read(f"{other_front} {mac}", "POST", "/api/chat?x=1")
    assert (read is None) == (other_front != front)


@pytest.mark.parametrize(
    ("number", "status"),
    [("012", 400), ("0", 400), ("", 400), ("+12", 400), ("\xb2", 400), ("9" * 16, 400), ("13", None)],
)
def test_a_number_written_otherwise_is_no_number_of_a_remembered_call_either(number, status):
    heads = CallHeads(only_attic)
    good = sign(SECRET, **ELEMENTS)
    assert heads.read(good, "POST", "/api/chat?x=1") is not None
    other = good.replace(" 12 ", f" {number} ")
    if status is None:
        assert heads.read(other, "POST", "/api/chat?x=1") is None
        return
    with pytest.raises(AuthError) as refused:
        heads.read(other, "POST", "/api/chat?x=1")
    assert refused.value.status == status


@quick
@given(seqs=st.lists(st.integers(1, 2**53 - 1), min_size=1, max_size=4), garble=st.data())
def test_heads_are_read_with_a_memory_as_without(seqs, garble):
    heads = CallHeads(only_attic)
    for seq in seqs:
        value = sign(SECRET, **(ELEMENTS | {"seq": seq}))
        assert heads.read(value, "POST", "/api/chat?x=1") == (parse_auth(value), SECRET)
        at = garble.draw(st.integers(0, len(value) - 1))
        char = garble.draw(st.characters(max_codepoint=255).filter(lambda char, old=value[at]: char != old))
        with contextlib.suppress(AuthError):
            assert heads.read(value[:at] + char + value[at + 1 :], "POST", "/api/chat?x=1") is None


def test_a_remembered_call_of_a_key_that_is_not_known_any_more_is_refused():
    keys = {ATTIC: SECRET}
    heads = CallHeads(keys.get)
    old, new = (sign(key, **ELEMENTS) for key in (SECRET, SECRET[::-1]))
    assert heads.read(old, "POST", "/api/chat?x=1") is not None
    keys[ATTIC] = SECRET[::-1]
    assert heads.read(old, "POST", "/api/chat?x=1") is None
    assert heads.read(new, "POST", "/api/chat?x=1") == (parse_auth(new), SECRET[::-1])
    keys.clear()
    assert heads.read(new, "POST", "/api/chat?x=1") is None


def test_calls_that_were_not_signed_well_fill_no_memory():
    heads = CallHeads(only_attic)
    bad = sign(SECRET, **ELEMENTS).rpartition(" ")[0] + " " + "0" * 64
    for number in range(3):
        assert heads.read(bad, "POST", f"/{number}") is None
    assert not heads._known
    for number in range(2 * CallHeads._MOST):
        value = sign(SECRET, **(ELEMENTS | {"target": f"/{number}"}))
        assert heads.read(value, "POST", f"/{number}") is not None
    assert len(heads._known) <= CallHeads._MOST


def test_a_target_outside_ascii_can_be_signed():
    elements = ELEMENTS | {"target": "/v1/models/\u00ff\ud800"}
    header = parse_auth(sign(SECRET, **elements))
    assert mac_ok(SECRET, header, direction="call", method="POST", target="/v1/models/\u00ff\ud800")


def test_a_key_id_comes_apart_where_it_was_joined():
    assert split_key_id(key_id("attic", "00000000000000aa")) == ("attic", "00000000000000aa")


FIELDS = FIRST_BEAT.split(" ")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (0, "one"),
        (0, ""),
        (1, "attic"),
        (1, "attic/00000000000000AA"),
        (1, "attic/00000000000000a"),
        (1, "../00000000000000aa"),
        (1, "a<b/00000000000000aa"),
        (1, "x" * 65 + "/00000000000000aa"),
        (2, "-"),
        (2, "00000000000000BB"),
        (3, ""),
        (3, "--"),
        (4, "0"),
        (4, "07"),
        (4, "-7"),
        (4, "7.0"),
        (4, "٧"),
        (4, str(2**53)),
        (4, "9" * 400),
        (5, HASH_OF_BRACES[1:]),
        (5, HASH_OF_BRACES.upper()),
        (6, MAC_OF_FIRST_BEAT + "0"),
        (6, MAC_OF_FIRST_BEAT + "\n"),
    ],
)
def test_a_malformed_field_is_answered_400(field, value):
    fields = [*FIELDS]
    fields[field] = value
    with pytest.raises(AuthError) as caught:
        parse_auth(" ".join(fields))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "value",
    [
        " ".join(FIELDS[:6]),
        FIRST_BEAT + " x",
        " " + FIRST_BEAT,
        FIRST_BEAT + " ",
        FIRST_BEAT.replace(" ", "  "),
    ],
)
def test_too_few_or_too_many_fields_are_answered_400(value):
    with pytest.raises(AuthError) as caught:
        parse_auth(value)
    assert caught.value.status == 400


def test_an_unsigned_request_is_answered_401_and_another_version_426():
    with pytest.raises(AuthError) as missing:
        parse_auth("")
    with pytest.raises(AuthError) as newer:
        parse_auth("2 something else entirely")
    assert (missing.value.status, newer.value.status) == (401, 426)


@quick
@given(st.text(max_size=300) | st.lists(st.sampled_from(["1", "-", "7", *FIELDS]), max_size=9).map(" ".join))
def test_no_text_raises_anything_but_auth_error(value):
    try:
        header = parse_auth(value)
    except AuthError:
        return
    assert value.startswith(f"1 {header.key_id} ")


# --- the window of calls


@quick
@given(
    st.integers(0, 12),
    st.lists(st.integers(-3, 60) | st.sampled_from([2**40, 2**40 - 5, 2**53 - 1]), max_size=80),
)
def test_the_window_takes_each_number_once_in_any_order_and_none_from_far_below(size, numbers):
    window = SeqWindow(size)
    seen: set[int] = set()
    for number in numbers:
        wanted = number >= 1 and number not in seen and number >= max(seen, default=0) - size
        assert window.accept(number) is wanted
        if wanted:
            seen.add(number)


@quick
@given(st.integers(1, 2**53 - 1), st.permutations(range(20)))
def test_calls_that_overtake_each_other_are_all_taken_and_none_twice(first, order):
    window = SeqWindow()
    assert all(window.accept(first + number) for number in order)
    assert not any(window.accept(first + number) for number in order)


def test_the_window_is_8192_wide():
    window = SeqWindow()
    assert window.accept(10_000)
    assert window.accept(10_000 - 8192)
    assert not window.accept(10_000 - 8193)
    assert window.accept(10_001)
    assert not window.accept(10_000 - 8192)


def test_a_number_at_the_very_edge_of_the_window_is_still_remembered():
    window = SeqWindow(4)
    assert window.accept(1)
    assert window.accept(5)
    assert not window.accept(1)


# --- beats, at the router


def beat(seq, boot=AGENT_BOOT, receiver=ROUTER_BOOT, sender=ATTIC):
    return AuthHeader(sender, boot, receiver, seq, HASH_OF_BRACES, MAC_OF_FIRST_BEAT)


def take(gate, header):
    """What the router does with a beat whose mac and body are good."""
    refusal = gate.check(header)
    if refusal is None:
        gate.accept(header)
    return refusal.status if refusal else 200


def test_a_beat_that_names_no_or_another_router_boot_learns_the_right_one():
    gate = BeatGate(ROUTER_BOOT)
    for receiver in (None, "00000000000000cd"):
        refusal = gate.check(beat(1, receiver=receiver))
        assert isinstance(refusal, Refusal)
        assert (refusal.status, refusal.boot) == (401, ROUTER_BOOT)
    assert take(gate, beat(2)) == 200


def test_a_replayed_beat_is_refused():
    gate = BeatGate(ROUTER_BOOT)
    assert [take(gate, beat(seq)) for seq in (1, 1, 3, 2, 3, 4)] == [200, 409, 200, 409, 409, 200]


def test_a_beat_that_was_checked_but_not_accepted_uses_no_number():
    gate = BeatGate(ROUTER_BOOT)
    assert gate.check(beat(5)) is None
    assert gate.boot_of(ATTIC) is None
    assert take(gate, beat(5)) == 200
    assert gate.boot_of(ATTIC) == AGENT_BOOT


def test_a_restarted_agent_is_accepted_at_once_and_its_old_boot_never_again():
    gate = BeatGate(ROUTER_BOOT)
    newer = "00000000000000bd"
    assert take(gate, beat(900)) == 200
    assert take(gate, beat(1, boot=newer)) == 200
    assert take(gate, beat(901)) == 409
    assert take(gate, beat(2, boot=newer)) == 200
    assert gate.boot_of(ATTIC) == newer


def test_a_beat_held_up_until_its_process_had_a_successor_does_not_bring_it_back():
    gate = BeatGate(ROUTER_BOOT)
    newer = "00000000000000bd"
    assert take(gate, beat(1, receiver=None)) == 401
    held_up = beat(2)
    assert take(gate, beat(1, boot=newer)) == 200
    assert take(gate, held_up) == 409
    assert take(gate, beat(2, boot=newer)) == 200


def test_agents_do_not_share_their_numbers():
    gate = BeatGate(ROUTER_BOOT)
    assert take(gate, beat(5)) == 200
    assert take(gate, beat(5, sender="cellar/00000000000000aa")) == 200


def test_what_is_kept_of_an_agent_that_restarts_for_ever_is_bounded(monkeypatch):
    monkeypatch.setattr(auth._Boots, "_MOST", 3)
    gate = BeatGate(ROUTER_BOOT)
    for boot in range(1, 20):
        assert take(gate, beat(1, boot=f"{boot:016x}")) == 200
        for earlier in range(max(1, boot - 2), boot):
            assert take(gate, beat(2, boot=f"{earlier:016x}")) == 409
    assert len(gate._senders[ATTIC].boots._order) == 3


class BeatsOnABadNetwork(RuleBasedStateMachine):
    """F33: whatever is restarted, replayed, reordered or held up, the past never comes back.

    Every message ever sent stays on the wire and may be delivered again at any time. Processes are numbered,
    so that their true order is known to the test and only to it.
    """

    def __init__(self):
        super().__init__()
        self.key = node_key(SECRET, ATTIC)
        self.wire: list[tuple[str, int, int, bool]] = []  # header, agent process, number, draining
        self.agents = self.routers = 0
        self.start_router()
        self.start_agent()

    def start_router(self):
        self.routers += 1
        self.router_boot = f"{self.routers:016x}"
        self.gate = BeatGate(self.router_boot)
        self.accepted: list[tuple[int, int, bool]] = []

    def start_agent(self):
        self.agents += 1
        self.agent_boot = f"{0xA00 - self.agents:016x}"
        self.named, self.seq, self.draining = None, 0, False

    def send(self):
        self.seq += 1
        value = sign(
            self.key,
            direction="beat",
            method="POST",
            target="/heartbeat",
            key_id=ATTIC,
            sender_boot=self.agent_boot,
            receiver_boot=self.named,
            seq=self.seq,
            body_sha256=HASH_OF_BRACES,
        )
        self.wire.append((value, self.agents, self.seq, self.draining))
        return self.wire[-1]

    def deliver(self, message):
        value, process, seq, draining = message
        header = parse_auth(value)
        assert mac_ok(self.key, header, direction="beat", method="POST", target="/heartbeat")
        refusal = self.gate.check(header)
        if refusal is not None:
            if refusal.boot is not None and process == self.agents:
                self.named = refusal.boot
            return refusal.status
        assert header.receiver_boot == self.router_boot
        if self.accepted:
            last_process, last_seq, last_draining = self.accepted[-1]
            assert (process, seq) > (last_process, last_seq)
            assert process > last_process or draining >= last_draining
        self.gate.accept(header)
        self.accepted.append((process, seq, draining))
        return 200

    @rule()
    def a_beat_is_sent_and_held_up(self):
        self.send()

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def something_from_the_wire_arrives(self, data):
        self.deliver(data.draw(st.sampled_from(self.wire)))

    @rule()
    def the_living_agent_beats_and_is_heard(self):
        status = self.deliver(self.send())
        if status == 401:
            status = self.deliver(self.send())
        assert status == 200

    @rule()
    def the_agent_restarts(self):
        self.start_agent()

    @rule()
    def the_agent_drains(self):
        self.draining = True

    @rule()
    def the_router_restarts(self):
        self.start_router()

    @invariant()
    def the_router_believes_the_last_beat_it_accepted(self):
        process = self.accepted[-1][0] if self.accepted else None
        assert self.gate.boot_of(ATTIC) == (None if process is None else f"{0xA00 - process:016x}")


TestBeatsOnABadNetwork = BeatsOnABadNetwork.TestCase
TestBeatsOnABadNetwork.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


# --- calls, at the agent


def call(seq, boot=ROUTER_BOOT, receiver=AGENT_BOOT, sender=ATTIC):
    return AuthHeader(sender, boot, receiver, seq, HASH_OF_BRACES, MAC_OF_FIRST_BEAT)


def status_of(gate, header):
    refusal = gate.check_and_accept(header)
    return refusal.status if refusal else 200


def test_nobody_may_call_before_a_reply_to_a_beat_named_the_router():
    gate = CallGate(AGENT_BOOT)
    refusal = gate.check_and_accept(call(1))
    assert refusal is not None
    assert (refusal.status, refusal.boot) == (401, None)
    gate.learn_router_boot(ATTIC, ROUTER_BOOT)
    assert status_of(gate, call(1)) == 200


def test_a_call_for_an_earlier_process_of_the_agent_learns_the_present_one():
    gate = CallGate(AGENT_BOOT)
    gate.learn_router_boot(ATTIC, ROUTER_BOOT)
    for receiver in (None, "00000000000000ba"):
        refusal = gate.check_and_accept(call(1, receiver=receiver))
        assert refusal is not None
        assert (refusal.status, refusal.boot) == (401, AGENT_BOOT)
    assert status_of(gate, call(1)) == 200


def test_calls_come_in_any_order_and_each_once():
    gate = CallGate(AGENT_BOOT)
    gate.learn_router_boot(ATTIC, ROUTER_BOOT)
    assert [status_of(gate, call(seq)) for seq in (2, 1, 3, 2, 9000, 808, 807)] == [
        200,
        200,
        200,
        409,
        200,
        200,
        409,
    ]


def test_a_restarted_router_counts_anew_and_its_old_boot_is_over():
    gate = CallGate(AGENT_BOOT)
    newer = "00000000000000cd"
    gate.learn_router_boot(ATTIC, ROUTER_BOOT)
    assert [status_of(gate, call(seq)) for seq in (1, 500)] == [200, 200]
    assert status_of(gate, call(1, boot=newer)) == 401
    gate.learn_router_boot(ATTIC, newer)
    assert status_of(gate, call(1, boot=newer)) == 200
    assert status_of(gate, call(501)) == 409
    gate.learn_router_boot(ATTIC, ROUTER_BOOT)
    assert status_of(gate, call(501)) == 409
    assert status_of(gate, call(2, boot=newer)) == 200


def test_hearing_the_same_router_again_does_not_open_its_window_again():
    gate = CallGate(AGENT_BOOT)
    gate.learn_router_boot(ATTIC, ROUTER_BOOT)
    assert status_of(gate, call(1)) == 200
    gate.learn_router_boot(ATTIC, ROUTER_BOOT)
    assert status_of(gate, call(1)) == 409


@pytest.mark.parametrize("wrong", [{"receiver": "00000000000000ba"}, {"boot": "00000000000000cd"}])
def test_a_refused_call_moves_nothing(wrong):
    gate = CallGate(AGENT_BOOT)
    gate.learn_router_boot(ATTIC, ROUTER_BOOT)
    assert status_of(gate, call(2**50, **wrong)) == 401
    assert status_of(gate, call(1)) == 200


# --- the join token

TOKEN = Token("5ca1ab1e", ("http://192.168.1.20:11435", "http://[fd00::1]:11435"), SECRET)


def token_of(fields):
    text = json.dumps(fields) if not isinstance(fields, str) else fields
    return "herd1_" + base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def fields_of_token(**changes):
    secret = base64.urlsafe_b64encode(SECRET).decode().rstrip("=")
    return {"r": "5ca1ab1e", "u": ["http://attic:11435"], "s": secret} | changes


def test_a_token_is_one_word_and_reads_as_it_was_written():
    word = render_token(TOKEN)
    assert word.startswith("herd1_")
    assert word.replace("_", "").replace("-", "").isalnum()
    assert parse_token(word) == TOKEN
    assert parse_token(f"  {word}\r\n") == TOKEN


@quick
@given(
    st.binary(min_size=32, max_size=32),
    st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    st.integers(1, 16),
)
def test_every_secret_survives_the_token(secret, router_id, number):
    token = Token(router_id, tuple(f"http://10.0.0.{part}:11435" for part in range(number)), secret)
    assert parse_token(render_token(token)) == token


def test_a_token_cut_short_is_refused_wherever_it_was_cut():
    word = render_token(TOKEN)
    for length in range(len(word)):
        with pytest.raises(TokenError):
            parse_token(word[:length])


def test_fields_that_a_later_version_adds_are_ignored():
    assert parse_token(token_of(fields_of_token(f="sha256:00"))).secret == SECRET


@pytest.mark.parametrize(
    "word",
    [
        "",
        " \n",
        "hello",
        "herd2_abc",
        "HERD1_abc",
        "herd1_",
        "herd1_a",
        "herd1_abc def",
        "herd1_abc.def",
        "herd1_abc=",
        "herd1_ä",
        "herd1_" + "A" * 5000,
        token_of("[" * 2000),
        token_of("[]"),
        token_of("null"),
        token_of('"x"'),
        token_of("{}"),
        "herd1_" + base64.urlsafe_b64encode(b"\xff\xfe{}").decode().rstrip("="),
        *(token_of(fields_of_token(r=router)) for router in (None, 1, "", "a b", "x" * 65, "a\n")),
        *(
            token_of(fields_of_token(u=urls))
            for urls in (
                None,
                [],
                "http://a:1",
                [1],
                ["a:11435"],
                ["ftp://a:1"],
                ["http://"],
                ["http://a:99999"],
                ["http://a:0"],
                ["http://user:pw@a:1"],
                ["http://a:1/x"],
                ["http://a:1?x"],
                ["http://a:1\n"],
                ["http://[a"],
                ["http://ä:1"],
                ["http://" + "a" * 300],
                ["http://a:1"] * 17,
            )
        ),
        *(
            token_of(fields_of_token(s=secret))
            for secret in (None, 7, "", "AAAA", "A" * 44, "ä", "A" * 42 + "=")
        ),
    ],
)
def test_what_is_no_token_is_refused_with_one_sentence(word):
    with pytest.raises(TokenError) as caught:
        parse_token(word)
    sentence = str(caught.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert len(sentence) < 120


@quick
@given(
    st.text(max_size=80)
    | st.text(alphabet="herd1_AZaz09-_=. ", max_size=80).map(lambda text: "herd1_" + text)
)
def test_no_text_raises_anything_but_token_error(text):
    with pytest.raises(TokenError):
        parse_token(text)


def test_a_token_does_not_show_its_secret():
    shown = f"{TOKEN!r} {TOKEN}"
    assert "5ca1ab1e" in shown
    assert str(SECRET) not in shown
    assert repr(SECRET) not in shown
