/* Snappy's raw format decoded in pieces, so that neither the compressed bytes nor the text are in memory as a whole.
 *
 * Format: github.com/google/snappy, format_description.txt. After a length come elements, each a tag of one to five
 * bytes: a literal, whose bytes follow, or a copy of 1 to 64 bytes from so many bytes before.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <string.h>

#define LONGEST_TAG 5
#define LONGEST_COPY 64

/* The tag at `source`: its own bytes in *tag, the element's length, and the distance of a copy (0: a literal). */
static void read_tag(const unsigned char *source, Py_ssize_t *tag, Py_ssize_t *length, Py_ssize_t *distance)
{
    unsigned first = source[0];
    Py_ssize_t value = 0;
    switch (first & 3) {
    case 0:
        *distance = 0;
        *length = first >> 2;
        *tag = 1;
        if (*length >= 60) {
            int more = (int)(*length - 59);
            for (int i = 0; i < more; i++)
                value |= (Py_ssize_t)source[1 + i] << (8 * i);
            *length = value;
            *tag += more;
        }
        *length += 1;
        return;
    case 1:
        *length = 4 + ((first >> 2) & 7);
        *distance = (Py_ssize_t)(first >> 5) << 8 | source[1];
        *tag = 2;
        return;
    default:
        *length = 1 + (first >> 2);
        *tag = (first & 3) == 2 ? 3 : 5;
        for (int i = 1; i < *tag; i++)
            value |= (Py_ssize_t)source[i] << (8 * (i - 1));
        *distance = value;
    }
}

PyDoc_STRVAR(decode_doc,
"decode(source, at, last, window, filled, literal) -> (at, filled, literal)\n\n"
"Decodes `source` from byte `at` on behind the `filled` bytes of `window`, until the window has no room for an element\n"
"or the source may not hold another tag whole; `last`: no more of it comes. `literal`: bytes left of one that was\n"
"begun. Raises ValueError for a source that is not snappy's, or that copies from before the window.");

static PyObject *decode(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer source, window;
    Py_ssize_t at, filled, literal;
    int last;
    if (!PyArg_ParseTuple(args, "y*npw*nn", &source, &at, &last, &window, &filled, &literal))
        return NULL;
    const unsigned char *in = source.buf;
    unsigned char *out = window.buf;
    const char *wrong = NULL;
    if (at < 0 || at > source.len || filled < 0 || filled > window.len || literal < 0)
        wrong = "out of bounds";
    Py_BEGIN_ALLOW_THREADS
    while (wrong == NULL) {
        if (literal) {
            Py_ssize_t step = literal;
            if (step > source.len - at)
                step = source.len - at;
            if (step > window.len - filled)
                step = window.len - filled;
            if (step == 0)
                break;
            memcpy(out + filled, in + at, (size_t)step);
            at += step, filled += step, literal -= step;
            continue;
        }
        Py_ssize_t left = source.len - at;
        if (left == 0 || (left < LONGEST_TAG && !last) || window.len - filled < LONGEST_COPY)
            break;
        unsigned char padded[LONGEST_TAG] = {0};
        Py_ssize_t tag, length, distance;
        memcpy(padded, in + at, (size_t)(left < LONGEST_TAG ? left : LONGEST_TAG));
        read_tag(padded, &tag, &length, &distance);
        if (tag > left) {
            wrong = "it ends within a tag";
        } else if ((padded[0] & 3) == 0) {
            literal = length;
        } else if (distance == 0 || distance > filled) {
            wrong = "a copy from before the beginning";
        } else {
            for (Py_ssize_t i = 0; i < length; i++)  /* may overlap: byte by byte */
                out[filled + i] = out[filled + i - distance];
            filled += length;
        }
        if (wrong == NULL)
            at += tag;
    }
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&source);
    PyBuffer_Release(&window);
    if (wrong != NULL) {
        PyErr_SetString(PyExc_ValueError, wrong);
        return NULL;
    }
    return Py_BuildValue("nnn", at, filled, literal);
}

static PyMethodDef methods[] = {
    {"decode", decode, METH_VARARGS, decode_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_snappy", .m_size = 0, .m_methods = methods};

PyMODINIT_FUNC PyInit__snappy(void)
{
    return PyModuleDef_Init(&module);
}
