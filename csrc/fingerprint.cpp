// Which sources the library was built from, as `_build.py` looks for it; apart, so that a change compiles little.
extern "C" __attribute__((visibility("default"), used)) const char encdiff_sources[] =
    "encdiff-sources:" ENCDIFF_SOURCES;
