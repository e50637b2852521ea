from federated_sites import make_sites  # noqa: F401  a fixture
from stand_in_pictures import real_pictures, stand_in_pictures  # noqa: F401  fixtures
