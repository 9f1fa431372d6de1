# SPDX-License-Identifier: Apache-2.0
"""URLs of other programs' metrics servers: what is none is said before anything is attached."""

import pytest

from kptrace.daemon.fetcher import Fetcher
from kptrace.kernel.netns import NetworkNamespace
from kptrace.model.errors import UsageError


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:9962", "https://127.0.0.1:9962", "http://127.0.0.1", "http://a:b", "on"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    """The error names the option and gives a good example."""
    netns = NetworkNamespace(None)
    with pytest.raises(UsageError, match="--some-metrics") as caught:
        Fetcher(netns, url, "--some-metrics", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1" in str(caught.value.remedy)
    netns.close()


def test_a_port_that_nobody_listens_on_is_an_os_error() -> None:
    """Whoever asks knows that there is no answer; the path of the URL is there to be asked for."""
    netns = NetworkNamespace(None)
    fetcher = Fetcher(netns, "http://127.0.0.1:1/some/metrics", "--some-metrics", "")
    assert fetcher.path == "/some/metrics"
    with pytest.raises(OSError):
        fetcher(fetcher.path)
    netns.close()
