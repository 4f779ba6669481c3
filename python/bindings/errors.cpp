// Errors that nanobind itself sets. Its library is compiled with this in place of PyErr_SetString (cmake/Python.cmake).
#include <Python.h>

#include <cstring>

// A call with arguments that a function does not take is answered in one line, as every other error, not with all
// signatures: kv4.arguments.wrong_arguments.
extern "C" void kv4_set_error(PyObject* kind, const char* text) {
  if (kind == PyExc_TypeError && std::strstr(text, "(): incompatible function arguments.") != nullptr) {
    PyObject* said = PyUnicode_FromString(text);  // before other code runs: nanobind may write over it
    PyObject* arguments = said == nullptr ? nullptr : PyImport_ImportModule("kv4.arguments");
    PyObject* line = arguments == nullptr ? nullptr : PyObject_CallMethod(arguments, "wrong_arguments", "O", said);
    Py_XDECREF(said);
    Py_XDECREF(arguments);
    if (line != nullptr) {
      PyErr_SetObject(kind, line);
      Py_DECREF(line);
      return;
    }
    PyErr_Clear();
  }
  PyErr_SetString(kind, text);
}
