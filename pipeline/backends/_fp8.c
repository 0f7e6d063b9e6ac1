/* BF16 -> FP8 E4M3 with one scale a row: llm-compressor's bits in one pass, without the GIL.
 *
 * The arithmetic is compressed-tensors 0.18's, step for step (quantization/utils/helpers.py,
 * calculate_qparams, and quantization/lifecycle/forward_helpers.py, _quantize, on a CPU):
 *     scale = bf16(max|row| / 448), or eps(bf16) = 2^-7 where that is zero
 *     code  = e4m3(clamp(bf16(x / scale) + 0, -448, 448))
 * each rounding to nearest even. tests/test_fp8.py holds it equal to the library for every BF16
 * value. The loops are plain so that the compiler turns them into SIMD for every clone below.
 */
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t round_to_bf16(uint32_t bits) {
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

/* Returns the first row that holds NaN or Inf, or -1. Rows after it are left unwritten. */
CLONES static Py_ssize_t quantize_rows(const uint16_t *source, uint8_t *codes, uint16_t *scales,
                                       Py_ssize_t rows, Py_ssize_t columns) {
    for (Py_ssize_t row = 0; row < rows; row++) {
        const uint16_t *x = source + row * columns;
        uint8_t *out = codes + row * columns;
        uint16_t largest = 0;
        for (Py_ssize_t i = 0; i < columns; i++) {
            uint16_t magnitude = x[i] & 0x7fff;
            largest = magnitude > largest ? magnitude : largest;
        }
        if (largest >= 0x7f80)
            return row;
        uint32_t scale_bits = round_to_bf16(bits_of(float_of((uint32_t)largest << 16) / 448.0f));
        if (scale_bits == 0)
            scale_bits = 0x3c000000u; /* eps of bfloat16 */
        scales[row] = (uint16_t)(scale_bits >> 16);
        const float scale = float_of(scale_bits);
        for (Py_ssize_t i = 0; i < columns; i++) {
            uint32_t quotient = bits_of(float_of((uint32_t)x[i] << 16) / scale);
            uint32_t a = round_to_bf16(quotient & 0x7fffffffu);
            a = a < 0x43e00000u ? a : 0x43e00000u; /* 448 */
            /* normal: drop 20 mantissa bits to nearest even, rebias the exponent from 127 to 7 */
            uint32_t normal = ((a + 0x7ffffu + ((a >> 20) & 1u)) >> 20) - (120u << 3);
            /* below 2^-6: adding 2^14, whose ulp is 2^-9, leaves the subnormal code in the low bits */
            uint32_t subnormal = bits_of(float_of(a) + 16384.0f) - 0x46800000u;
            uint32_t code = a < 0x3c800000u ? subnormal : normal;
            /* the library adds a zero point of +0, which turns -0 into +0 */
            uint32_t sign = a ? (quotient >> 24) & 0x80u : 0;
            out[i] = (uint8_t)(code | sign);
        }
    }
    return -1;
}

CLONES static uint32_t largest_masked_16(const uint16_t *x, Py_ssize_t count) {
    uint16_t largest = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        uint16_t magnitude = x[i] & 0x7fff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

CLONES static uint32_t largest_masked_32(const uint32_t *x, Py_ssize_t count) {
    uint32_t largest = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        uint32_t magnitude = x[i] & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

CLONES static void transpose_16(const uint16_t *source, uint16_t *target, Py_ssize_t rows, Py_ssize_t columns) {
    enum { TILE = 32 };
    uint16_t tile[TILE][TILE + 2]; /* rows a power of two apart share a cache set; a padded copy does not */
    for (Py_ssize_t i = 0; i < rows; i += TILE)
        for (Py_ssize_t j = 0; j < columns; j += TILE) {
            Py_ssize_t high = rows - i < TILE ? rows - i : TILE;
            Py_ssize_t wide = columns - j < TILE ? columns - j : TILE;
            for (Py_ssize_t a = 0; a < high; a++)
                memcpy(tile[a], source + (i + a) * columns + j, (size_t)wide * sizeof(uint16_t));
            for (Py_ssize_t b = 0; b < wide; b++)
                for (Py_ssize_t a = 0; a < high; a++)
                    target[(j + b) * rows + i + a] = tile[a][b];
        }
}

static PyObject *py_quantize_rows(PyObject *module, PyObject *args) {
    Py_buffer source, codes, scales;
    Py_ssize_t rows, columns, bad;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*w*nn", &source, &codes, &scales, &rows, &columns))
        return NULL;
    PyObject *result = NULL;
    if (rows < 0 || columns < 0 || (columns && rows > PY_SSIZE_T_MAX / columns / 2) ||
        source.len != rows * columns * 2 || codes.len != rows * columns || scales.len != rows * 2 ||
        (uintptr_t)source.buf % 2 || (uintptr_t)scales.buf % 2) {
        PyErr_Format(PyExc_ValueError,
                     "quantize_rows: %zd x %zd BF16 values need aligned buffers of 2, 1 and (a row) 2 bytes each, "
                     "got %zd, %zd and %zd bytes", rows, columns, source.len, codes.len, scales.len);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    bad = quantize_rows(source.buf, codes.buf, scales.buf, rows, columns);
    Py_END_ALLOW_THREADS
    result = PyLong_FromSsize_t(bad);
done:
    PyBuffer_Release(&source);
    PyBuffer_Release(&codes);
    PyBuffer_Release(&scales);
    return result;
}

static PyObject *py_largest_magnitude(PyObject *module, PyObject *args) {
    Py_buffer data;
    Py_ssize_t width;
    uint32_t largest;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*n", &data, &width))
        return NULL;
    if ((width != 2 && width != 4) || data.len % width || (uintptr_t)data.buf % (uintptr_t)width) {
        PyErr_Format(PyExc_ValueError, "largest_magnitude: %zd bytes are no aligned array of %zd-byte floats",
                     data.len, width);
        PyBuffer_Release(&data);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    largest = width == 2 ? largest_masked_16(data.buf, data.len / 2) : largest_masked_32(data.buf, data.len / 4);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&data);
    return PyLong_FromUnsignedLong(largest);
}

static PyObject *py_transpose(PyObject *module, PyObject *args) {
    Py_buffer source, target;
    Py_ssize_t rows, columns;
    (void)module;
    if (!PyArg_ParseTuple(args, "y*w*nn", &source, &target, &rows, &columns))
        return NULL;
    PyObject *result = NULL;
    if (rows < 0 || columns < 0 || (columns && rows > PY_SSIZE_T_MAX / columns / 2) ||
        source.len != rows * columns * 2 || target.len != source.len ||
        (uintptr_t)source.buf % 2 || (uintptr_t)target.buf % 2) {
        PyErr_Format(PyExc_ValueError, "transpose: %zd x %zd 2-byte values do not fit %zd and %zd bytes",
                     rows, columns, source.len, target.len);
        goto done;
    }
    Py_BEGIN_ALLOW_THREADS
    transpose_16(source.buf, target.buf, rows, columns);
    Py_END_ALLOW_THREADS
    result = Py_NewRef(Py_None);
done:
    PyBuffer_Release(&source);
    PyBuffer_Release(&target);
    return result;
}

static PyMethodDef methods[] = {
    {"quantize_rows", py_quantize_rows, METH_VARARGS,
     "quantize_rows(source, codes, scales, rows, columns) -> first row with NaN or Inf, or -1"},
    {"largest_magnitude", py_largest_magnitude, METH_VARARGS,
     "largest_magnitude(floats, width) -> bits of the largest |x| as an integer; NaN and Inf are the largest of all"},
    {"transpose", py_transpose, METH_VARARGS, "transpose(source, target, rows, columns): 2-byte values"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_fp8", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__fp8(void) { return PyModuleDef_Init(&definition); }
