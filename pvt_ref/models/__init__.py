"""The networks. Each has a folder of its own, and is entered here."""

import dataclasses
from typing import Any

from pvt_ref.models.architecture import architectures, register
from pvt_ref.models.pvt import PVT
from pvt_ref.models.pvt_v2 import PVT_V2
from pvt_ref.models.segmentor import SEGMENTOR
from pvt_ref.models.segmentor.variants import published
from pvt_ref.models.vit import VIT

register(PVT)
register(PVT_V2)
register(VIT)
register(dataclasses.replace(SEGMENTOR, variants=published()))

#: The published models of all networks by name.
VARIANTS: dict[str, Any] = {
    name: config for row in architectures() for name, config in row.variants.items()
}
