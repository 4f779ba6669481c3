/* KV4_API: what the shared library exports. All else in it is hidden, KV4_LOCAL also in a class that is exported. In a
 * static library everything is hidden: what links it does not export it again. */
#ifndef KV4_EXPORT_H
#define KV4_EXPORT_H

#if defined(kv4_EXPORTS) && !defined(_WIN32) /* CMake's, while the shared library is compiled */
#define KV4_API __attribute__((visibility("default")))
#define KV4_LOCAL __attribute__((visibility("hidden")))
#else
#define KV4_API
#define KV4_LOCAL
#endif

#endif
