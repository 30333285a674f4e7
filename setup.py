"""Builds the extensions. Everything else about the package is in pyproject.toml.

Environment:
    RESOLVER_NO_EXTENSIONS=1  build without them; their Python twins take their place
    DEBUG_BUILD=1             no optimisation, full debug information
    SANITIZE=1                AddressSanitizer and UndefinedBehaviorSanitizer
"""

import os
import sys

from setuptools import Extension, setup


def wanted(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


DIRECTIVES = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": False,
    "freethreading_compatible": True,
}

NEEDS = {  # of each extension, whose source lies where its name says
    "resolver._cache": ["resolver/_cache.pxd", "resolver/_platform.h"],
    "resolver.aio._hits": ["resolver/_cache.pxd", "resolver/aio/_hits.h"],
}

# Said here, too: CFLAGS in the environment takes the place of the interpreter's own.
flags = ["-std=c11", "-O3", "-fno-plt", "-Wall", "-Wextra", "-Wno-unused-parameter"]
link_flags = []
if wanted("DEBUG_BUILD"):
    flags += ["-O0", "-g3", "-UNDEBUG"]
if wanted("SANITIZE"):
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += [*sanitizers, "-g", "-fno-omit-frame-pointer"]
    link_flags += sanitizers

extensions = []
if sys.platform == "win32" and not wanted("RESOLVER_NO_EXTENSIONS"):
    sys.exit("the extensions need POSIX threads; set RESOLVER_NO_EXTENSIONS=1 on Windows")
if not wanted("RESOLVER_NO_EXTENSIONS"):
    from Cython.Build import cythonize

    extensions = cythonize(
        [
            Extension(
                name,
                [f"{name.replace('.', '/')}.pyx"],
                depends=needs,
                extra_compile_args=flags,
                extra_link_args=link_flags,
            )
            for name, needs in NEEDS.items()
        ],
        compiler_directives=DIRECTIVES,
        # Which sanitizers or debug flags an object was built with is not in its name.
        force=wanted("DEBUG_BUILD") or wanted("SANITIZE"),
    )
else:
    print("resolver: building without the extensions, as asked", file=sys.stderr)

setup(ext_modules=extensions)
