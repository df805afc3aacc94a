// Shared by the files of the shim: how a C++ exception becomes an error in Rust.
#pragma once
#include <ATen/ATen.h>
#include <cstring>
#include <exception>

// Runs `body`; on an exception leaves its text (malloc'ed) in `*err` and returns 1.
template <class F>
static int guarded(char** err, F&& body) {
  try {
    body();
    return 0;
  } catch (const c10::Error& e) {
    *err = strdup(e.what_without_backtrace());
  } catch (const std::exception& e) {
    *err = strdup(e.what());
  }
  return 1;
}
