from ._hits_py import Found as Found
from ._hits_py import LoopRouter as LoopRouter
from ._hits_py import fast_hits as fast_hits
