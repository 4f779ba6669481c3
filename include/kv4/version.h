// The library's version; the build system reads it from here.
#pragma once

#define KV4_VERSION "0.1.0"
