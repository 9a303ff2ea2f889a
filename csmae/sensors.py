"""The two sensors: bands, resolutions, order, statistics; and the 19 land-cover classes."""

S1_BANDS = ("VH", "VV")
"""Sentinel-1 polarisations in channel order: backscatter in dB, 10 m."""

S2_10M_BANDS = ("B02", "B03", "B04", "B08")
S2_20M_BANDS = ("B05", "B06", "B07", "B11", "B12", "B8A")

S2_BANDS = S2_10M_BANDS + S2_20M_BANDS
"""Sentinel-2 bands in channel order (that of the published weights): reflectance times 10,000."""

S2_RGB = (2, 1, 0)
"""Channels of B04, B03, B02: a natural-colour picture."""

IMAGE_SIZE = 120
"""Pixels along a side of a scene at 10 m."""

IMAGE_SIZE_20M = 60
"""Pixels along a side of a scene at 20 m."""

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
