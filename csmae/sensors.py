"""The two sensors: bands in channel order, resolutions, statistics, retrieval directions; the 19 land-cover classes."""

SENSORS = ("s1", "s2")
"""Sentinel-1 and Sentinel-2, always in this order."""

DIRECTIONS = tuple(f"{query}_to_{archive}" for query in SENSORS for archive in SENSORS)
"""Retrieval directions: ``s1_to_s2`` queries with S1 images and retrieves S2 images."""

S1_BANDS = ("VH", "VV")
"""Polarizations at 10 m: backscatter in dB."""

S2_10M_BANDS = ("B02", "B03", "B04", "B08")
S2_20M_BANDS = ("B05", "B06", "B07", "B11", "B12", "B8A")

S2_60M_BANDS = ("B01", "B09")
"""Bands that archives may hold and that the network does not read."""

S2_BANDS = S2_10M_BANDS + S2_20M_BANDS
"""Reflectance times 10,000; the order is that of the published weights."""

BANDS: dict[str, tuple[str, ...]] = {"s1": S1_BANDS, "s2": S2_BANDS}
"""Bands of each sensor in channel order."""

NUM_CHANNELS = {sensor: len(bands) for sensor, bands in BANDS.items()}

S2_RGB = (2, 1, 0)
"""S2 channels of a natural-color picture: B04, B03, B02."""

IMAGE_SIZE = 120
"""Pixels along a side of an image at 10 m."""

IMAGE_SIZE_20M = 60
IMAGE_SIZE_60M = 20

S1_MEAN = (-19.29044597721542, -12.619993741972035)
S1_STD = (5.464428464912864, 5.115911777546365)
S2_MEAN = (
    429.9430203,
    614.21682446,
    590.23569706,
    2218.94553375,
    950.68368468,
    1792.46290469,
    2075.46795189,
    1594.42694882,
    1009.32729131,
    2266.46036911,
)
S2_STD = (
    572.41639287,
    582.87945694,
    675.88746967,
    1365.45589904,
    729.89827633,
    1096.01480586,
    1273.45393088,
    1079.19066363,
    818.86747235,
    1356.13789355,
)

CLASSES = (
    "Agro-forestry areas",
    "Arable land",
    "Beaches, dunes, sands",
    "Broad-leaved forest",
    "Coastal wetlands",
    "Complex cultivation patterns",
    "Coniferous forest",
    "Industrial or commercial units",
    "Inland waters",
    "Inland wetlands",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Marine waters",
    "Mixed forest",
    "Moors, heathland and sclerophyllous vegetation",
    "Natural grassland and sparsely vegetated areas",
    "Pastures",
    "Permanent crops",
    "Transitional woodland, shrub",
    "Urban fabric",
)
"""The 19 classes of BigEarthNet in index order."""
