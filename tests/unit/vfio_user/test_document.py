"""What docs/vfio-user.md shows is what the program takes."""

from __future__ import annotations

import re
from pathlib import Path

from viommud.config import parse
from viommud.device_setup import plan
from viommud.vfio_user.config import VfioUserSection

TEXT = (Path(__file__).parents[3] / "docs" / "vfio-user.md").read_text()


def test_the_example_shows_every_key_with_its_default() -> None:
    """It is a configuration, and apart from the sockets everything in its table is the default."""
    (example,) = re.findall(r"^```toml\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (endpoint,) = plan(parse(example)).endpoints
    section = endpoint.vfio_user
    assert section == VfioUserSection(listen="/run/vm1/nvme-client.sock", server="/run/vm1/nvme.sock")
    for name in VfioUserSection.__struct_encode_fields__:
        assert re.search(rf"^{name} = ", example, re.MULTILINE), name
