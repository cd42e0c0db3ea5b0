"""What a training on toy networks runs in; a module that trains asks for both (`pytestmark`)."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Threads only cost time on networks this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def like_comfyuis_executor() -> Iterator[None]:
    """Nodes run in inference mode; the node leaves it for the training."""
    with torch.inference_mode(), torch.inference_mode(False), torch.enable_grad():
        yield
