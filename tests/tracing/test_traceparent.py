"""Our reading of traceparent, held against that of OpenTelemetry's own propagator."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.trace import get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vllm_unified.tracing import parsed

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{SPAN}-01"
HEX = "0123456789abcdef"
# Like the true ones, and a little wrong here and there.
ALMOST = st.builds(
    "{}-{}-{}-{}{}".format,
    st.sampled_from(["00", "01", "fe", "ff", "FF", "0", "000"]),
    st.one_of(st.just("0" * 32), st.text(HEX, min_size=32, max_size=32), st.text("0aA-", max_size=33)),
    st.one_of(st.just("0" * 16), st.text(HEX, min_size=16, max_size=16), st.text("0aA-", max_size=17)),
    st.sampled_from(["00", "01", "02", "03", "ff", "0x", "1", ""]),
    st.sampled_from(["", "-", "-more", "more", "\x00"]),
)


@given(ALMOST)
@example(VALID)
@example(f"01-{TRACE}-{SPAN}-01-what-comes-later")
def test_as_opentelemetry_reads_it(header: str) -> None:
    theirs = get_current_span(TraceContextTextMapPropagator().extract({"traceparent": header})).get_span_context()
    ours = parsed(header.encode())
    assert (ours is not None) == theirs.is_valid
    if ours is not None:
        assert (ours.trace_id, ours.span_id) == (theirs.trace_id, theirs.span_id)
        assert ours.sampled == theirs.trace_flags.sampled


@given(st.binary(max_size=100))
def test_any_bytes_are_read(header: bytes) -> None:
    parsed(header)


@pytest.mark.parametrize("flags", ["00", "01"])
def test_what_is_written_is_read_again(flags: str) -> None:
    context = parsed(f"00-{TRACE}-{SPAN}-{flags}".encode())
    assert context is not None
    assert context.traceparent.decode() == f"00-{TRACE}-{SPAN}-{flags}"
