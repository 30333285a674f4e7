from ._cache_py import ClientCache as ClientCache
from ._cache_py import fast_hits as fast_hits
from ._cache_py import leak as leak
