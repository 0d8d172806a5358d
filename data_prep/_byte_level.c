/* Byte-level BPE as the `tokenizers` library does it, for the GPT-2 splitter with or without isolated digits.
 *
 * A text is cut into words by the rules of
 *     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 * inside the pieces that isolated digits leave; each word goes through a cache of words seen before, and on a miss
 * through the merges. `encode_batch` holds the ids of its texts, `encode_long` hands them out in pieces while it walks,
 * inside a word too; all other memory is of fixed size, whatever the text. Nothing here knows Unicode: the class of each character comes
 * from Python (data_prep/character_classes.py).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <structmember.h>

enum { OTHER = 0, LETTER = 1, NUMBER = 2, SPACE = 3, DIGIT = 4 };

#define CHARACTERS 0x110000
#define CLASSES 0x200000 /* what four bytes can spell: no text, however broken, leads out of the table */
#define NO_RANK UINT32_MAX
#define SHORT_WORD 15   /* bytes of a word that fits into a cache key */
#define LONG_WORD 512   /* longer words are not kept: they hardly ever come again */
#define SCAN_SYMBOLS 48 /* up to here a linear search for the best merge beats a heap */
#define INLINE_IDS 3
#define ARENA_IDS (1u << 20) /* uint32 in each arena */
#define LONG_BITS 14
#define KEPT_SCRATCH (1u << 22) /* bytes of scratch that outlive the text they were needed for */
#define UNSETTLED 32 /* ids at the end of a window that what follows may change */
#define LOOKED_AT 16 /* bytes of a word without an end, for each id of a piece, after which the sink hears of them */

typedef struct {
    uint64_t key[2]; /* the word's bytes, zero-filled; the last byte is its length, 0 for an empty slot */
    uint32_t count;
    uint32_t ids[INLINE_IDS]; /* count <= INLINE_IDS: the ids; else ids[0] is their place in short_arena */
} ShortSlot;

typedef struct {
    uint64_t hash;
    uint32_t word, ids; /* places in long_arena */
    uint32_t length;    /* bytes of the word, 0 for an empty slot */
    uint32_t count;
} LongSlot;

typedef struct {
    uint64_t pair; /* left id << 32 | right id */
    uint32_t rank; /* NO_RANK for an empty slot */
    uint32_t merged;
} MergeSlot;

typedef struct {
    PyObject_HEAD
    uint8_t *classes;         /* [CLASSES] */
    uint32_t byte_ids[256];
    uint32_t *byte_ranks;     /* [256 * 256], rank of the merge of two single bytes */
    uint8_t *may_cross;       /* [256 * 256], 1 when a merge joins a token that ends in the first byte and one that
                                 begins with the second */
    MergeSlot *merges;
    uint64_t merge_mask;
    uint32_t *merged_of_rank;
    uint32_t *bytes_of_id;
    size_t window;            /* bytes of a word that are merged at one time */
    size_t piece;             /* ids after which `encode_long` hands them out */
    Py_ssize_t unsettled;     /* bytes at the end of a word whose ids what follows may change; see `add_reach` */
    ShortSlot *short_words;   /* buckets of two */
    unsigned short_shift;
    size_t short_buckets;
    LongSlot *long_words;
    uint32_t *short_arena;    /* thrown away as a whole, with the slots that point into it, when full */
    uint32_t *long_arena;
    uint32_t short_used, long_used;
    uint32_t *out;
    size_t out_used, out_size;
    uint32_t *symbols, *next, *prev; /* scratch of `merge_long` */
    uint64_t *heap;
    size_t scratch_size;
} Encoder;

/* Where the ids of a text go while it is walked. NULL in place of one: they are held. */
typedef struct {
    PyObject *call;
    const uint8_t *begin; /* of the text */
} Sink;

static int reserve_out(Encoder *self, size_t more);
static int hand_out(Encoder *self, const Sink *sink, size_t count, const uint8_t *read);

/* ---- merges ---- */

static inline uint64_t mix(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)(a ^ 0x9E3779B97F4A7C15ull) * (b ^ 0xD6E8FEB86659FD93ull);
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static inline const MergeSlot *find_merge(const Encoder *self, uint32_t left, uint32_t right)
{
    uint64_t pair = (uint64_t)left << 32 | right;
    uint64_t at = (pair * 0x9E3779B97F4A7C15ull) >> 20;
    for (;; at++) {
        const MergeSlot *slot = &self->merges[at & self->merge_mask];
        if (slot->pair == pair || slot->rank == NO_RANK)
            return slot;
    }
}

static inline uint32_t rank_of(const Encoder *self, uint32_t left, uint32_t right)
{
    return find_merge(self, left, right)->rank;
}

/* The merge of the lowest rank first, the leftmost among equals, one at a time. */
static size_t merge_short(const Encoder *self, const uint8_t *word, size_t length, uint32_t *ids)
{
    uint32_t ranks[SCAN_SYMBOLS];
    size_t count = length;
    for (size_t i = 0; i < length; i++)
        ids[i] = self->byte_ids[word[i]];
    for (size_t i = 0; i + 1 < length; i++)
        ranks[i] = self->byte_ranks[(size_t)word[i] << 8 | word[i + 1]];
    while (count > 1) {
        uint32_t best = NO_RANK;
        size_t at = 0;
        for (size_t i = 0; i + 1 < count; i++)
            if (ranks[i] < best) {
                best = ranks[i];
                at = i;
            }
        if (best == NO_RANK)
            break;
        ids[at] = self->merged_of_rank[best];
        count--;
        for (size_t i = at + 1; i < count; i++) {
            ids[i] = ids[i + 1];
            ranks[i - 1] = ranks[i];
        }
        if (at + 1 < count)
            ranks[at] = rank_of(self, ids[at], ids[at + 1]);
        if (at > 0)
            ranks[at - 1] = rank_of(self, ids[at - 1], ids[at]);
    }
    return count;
}

static void sift_up(uint64_t *heap, size_t at)
{
    uint64_t value = heap[at];
    while (at > 0) {
        size_t parent = (at - 1) / 4;
        if (heap[parent] <= value)
            break;
        heap[at] = heap[parent];
        at = parent;
    }
    heap[at] = value;
}

static void sift_down(uint64_t *heap, size_t size, size_t at)
{
    uint64_t value = heap[at];
    for (;;) {
        size_t first = at * 4 + 1;
        if (first >= size)
            break;
        size_t last = first + 4 < size ? first + 4 : size, least = first;
        for (size_t child = first + 1; child < last; child++)
            if (heap[child] < heap[least])
                least = child;
        if (heap[least] >= value)
            break;
        heap[at] = heap[least];
        at = least;
    }
    heap[at] = value;
}

static void free_scratch(Encoder *self)
{
    free(self->symbols);
    free(self->next);
    free(self->prev);
    free(self->heap);
    self->symbols = self->next = self->prev = NULL;
    self->heap = NULL;
    self->scratch_size = 0;
}

static int reserve_scratch(Encoder *self, size_t length)
{
    if (length <= self->scratch_size)
        return 0;
    free_scratch(self);
    size_t size = length < 4096 ? 4096 : length;
    self->symbols = malloc(size * sizeof(uint32_t));
    self->next = malloc(size * sizeof(uint32_t));
    self->prev = malloc(size * sizeof(uint32_t));
    self->heap = malloc(3 * size * sizeof(uint64_t)); /* one entry a pair, two more a merge */
    if (!self->symbols || !self->next || !self->prev || !self->heap) {
        free_scratch(self);
        PyErr_NoMemory();
        return -1;
    }
    self->scratch_size = size;
    return 0;
}

/* `merge_short` for words of any length, in O(n log n). Entries of the heap are rank << 32 | position; an entry is
 * stale when the pair at its position has another rank by now. Returns -1 with an exception when memory is short. */
static Py_ssize_t merge_long(Encoder *self, const uint8_t *word, size_t length, uint32_t *ids)
{
    const uint32_t end = UINT32_MAX;
    if (length >= end) {
        PyErr_SetString(PyExc_ValueError, "a word of 4 GiB or more");
        return -1;
    }
    if (reserve_scratch(self, length) < 0)
        return -1;
    uint32_t *symbols = self->symbols, *next = self->next, *prev = self->prev;
    uint64_t *heap = self->heap;
    size_t size = 0;
    for (size_t i = 0; i < length; i++) {
        symbols[i] = self->byte_ids[word[i]];
        next[i] = i + 1 < length ? (uint32_t)i + 1 : end;
        prev[i] = i > 0 ? (uint32_t)i - 1 : end;
        uint32_t rank = i + 1 < length ? self->byte_ranks[(size_t)word[i] << 8 | word[i + 1]] : NO_RANK;
        if (rank != NO_RANK)
            heap[size++] = (uint64_t)rank << 32 | i;
    }
    for (size_t i = size / 4 + 1; i-- > 0;)
        if (i < size)
            sift_down(heap, size, i);
    while (size > 0) {
        uint32_t rank = (uint32_t)(heap[0] >> 32), at = (uint32_t)heap[0];
        heap[0] = heap[--size];
        if (size > 0)
            sift_down(heap, size, 0);
        uint32_t right = next[at];
        /* A symbol that was merged into its left neighbour points to itself. */
        if (right == end || right == at || rank_of(self, symbols[at], symbols[right]) != rank)
            continue;
        symbols[at] = self->merged_of_rank[rank];
        uint32_t after = next[right], before = prev[at];
        next[right] = right;
        next[at] = after;
        if (after != end) {
            prev[after] = at;
            uint32_t found = rank_of(self, symbols[at], symbols[after]);
            if (found != NO_RANK) {
                heap[size++] = (uint64_t)found << 32 | at;
                sift_up(heap, size - 1);
            }
        }
        if (before != end) {
            uint32_t found = rank_of(self, symbols[before], symbols[at]);
            if (found != NO_RANK) {
                heap[size++] = (uint64_t)found << 32 | before;
                sift_up(heap, size - 1);
            }
        }
    }
    size_t count = 0;
    for (uint32_t at = 0; at != end; at = next[at])
        ids[count++] = symbols[at];
    if (self->scratch_size * (3 * sizeof(uint32_t) + 3 * sizeof(uint64_t)) > KEPT_SCRATCH)
        free_scratch(self);
    return (Py_ssize_t)count;
}

/* Whether the bytes of two tokens, merged alone, give these two again: 1, 0, or -1 with an exception. */
static int seam_holds(Encoder *self, const uint8_t *bytes, uint32_t left, uint32_t right)
{
    size_t length = (size_t)self->bytes_of_id[left] + self->bytes_of_id[right];
    uint32_t few[SCAN_SYMBOLS], *ids = few;
    Py_ssize_t count;
    if (length <= SCAN_SYMBOLS) {
        count = (Py_ssize_t)merge_short(self, bytes, length, few);
    } else {
        if (!(ids = malloc(length * sizeof(uint32_t)))) {
            PyErr_NoMemory();
            return -1;
        }
        count = merge_long(self, bytes, length, ids);
    }
    int holds = count < 0 ? -1 : count == 2 && ids[0] == left && ids[1] == right;
    if (ids != few)
        free(ids);
    return holds;
}

/* Hands out those of the `count` ids of a word that nothing can change any more. Returns how many stay; SIZE_MAX with
 * an exception. */
static size_t hand_out_settled(Encoder *self, const Sink *sink, size_t count, const uint8_t *read)
{
    size_t stay = 0;
    for (size_t bytes = 0; stay < count && bytes < (size_t)self->unsettled; stay++)
        bytes += self->bytes_of_id[self->out[count - 1 - stay]];
    self->out_used = count;
    if (count - stay >= self->piece && hand_out(self, sink, count - stay, read) < 0)
        return SIZE_MAX;
    return self->out_used;
}

/* `merge_long` in windows, with the same ids and memory that does not grow with the word.
 *
 * Why they are the same. Let the merges of u give tokens that end in a, those of v tokens that begin with b, and those
 * of the bytes of a and b alone give a, b again. Then those of uv give the tokens of u, then those of v. For suppose
 * that merging uv joins something across the seam, and look at the first time it does. Until then both sides were
 * merged as if they were alone, as the lowest rank of all is the lowest of its own side; and no merge of u crossed the
 * beginning of a, as a is one of its tokens; likewise for b and v. So within the bytes of a and b the merges were those
 * that these bytes see alone, in the same order, and the one across the seam, the lowest of all, comes next there too.
 * But it does not come there. By the same argument a run of neighbouring tokens of u is what its own bytes give, so
 * what is settled can be any beginning of a window.
 *
 * With a sink, ids are handed out once nothing that follows can change them: those that end `unsettled` bytes or more
 * before the furthest place that was settled. Going back ends there, and the window is then so long that it sees what
 * that place saw, so that the seam holds without a look. */
static int encode_windows(Encoder *self, const uint8_t *word, size_t length, const Sink *sink)
{
    if (sink && hand_out(self, sink, self->out_used, word) < 0)
        return -1;
    size_t first = self->out_used, done = 0, count = 0, furthest = 0, window = self->window, back = 1;
    for (;;) {
        size_t taken = length - done < window ? length - done : window;
        self->out_used = first + count;
        if (sink && reserve_out(self, taken) < 0)
            return -1;
        uint32_t *out = self->out + first;
        Py_ssize_t found = merge_long(self, word + done, taken, out + count);
        if (found < 0)
            return -1;
        if (count > 0) {
            int holds = seam_holds(self, word + done - self->bytes_of_id[out[count - 1]], out[count - 1], out[count]);
            if (holds < 0)
                return -1;
            if (!holds) { /* try an earlier seam, and more of what follows */
                for (size_t i = 0; i < back && count > 0; i++)
                    done -= self->bytes_of_id[out[--count]];
                back *= 2;
                window = window * 2 > furthest - done ? window * 2 : furthest - done;
                continue;
            }
        }
        if (done + taken == length) {
            self->out_used = first + count + (size_t)found;
            return 0;
        }
        size_t unsettled = (size_t)found / 2 < UNSETTLED ? (size_t)found / 2 : UNSETTLED;
        for (size_t i = unsettled; i < (size_t)found; i++)
            done += self->bytes_of_id[out[count++]];
        back = 1;
        if (done > furthest) { /* only then, so that it comes to an end */
            furthest = done;
            window = self->window;
            if (sink && count >= self->piece && (count = hand_out_settled(self, sink, count, word + done)) == SIZE_MAX)
                return -1;
        }
    }
}

/* ---- words: cache, then merges ---- */

/* Place of `count` uint32 in the arena of the short or the long words, which are forgotten when it is full. */
static uint32_t take_short(Encoder *self, uint32_t count)
{
    if (self->short_used + count > ARENA_IDS) {
        memset(self->short_words, 0, self->short_buckets * 2 * sizeof(ShortSlot));
        self->short_used = 0;
    }
    self->short_used += count;
    return self->short_used - count;
}

static uint32_t take_long(Encoder *self, uint32_t count)
{
    if (self->long_used + count > ARENA_IDS) {
        memset(self->long_words, 0, sizeof(LongSlot) << LONG_BITS);
        self->long_used = 0;
    }
    self->long_used += count;
    return self->long_used - count;
}

static int encode_short(Encoder *self, const uint8_t *word, size_t length, const uint8_t *end)
{
    static const uint64_t masks[9] = {
        0, 0xFF, 0xFFFF, 0xFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFF, 0xFFFFFFFFFFFF, 0xFFFFFFFFFFFFFF, UINT64_MAX,
    };
    uint64_t key[2] = {0, 0};
    if (end - word >= 16) { /* inside the text: read past the word and mask */
        memcpy(key, word, 16);
        key[0] &= masks[length < 8 ? length : 8];
        key[1] &= masks[length > 8 ? length - 8 : 0];
    } else {
        memcpy(key, word, length);
    }
    key[1] |= (uint64_t)length << 56;
    ShortSlot *bucket = &self->short_words[(mix(key[0], key[1]) >> self->short_shift) * 2];
    uint32_t *out = self->out + self->out_used;
    for (int way = 0; way < 2; way++) {
        const ShortSlot *slot = &bucket[way];
        if (slot->key[0] == key[0] && slot->key[1] == key[1]) {
            if (slot->count <= INLINE_IDS)
                memcpy(out, slot->ids, sizeof(slot->ids)); /* the buffer has room for ids that do not count */
            else
                memcpy(out, self->short_arena + slot->ids[0], slot->count * sizeof(uint32_t));
            self->out_used += slot->count;
            return 0;
        }
    }
    size_t count = merge_short(self, word, length, out);
    ShortSlot fresh = {{key[0], key[1]}, (uint32_t)count, {0, 0, 0}};
    if (count <= INLINE_IDS) {
        memcpy(fresh.ids, out, count * sizeof(uint32_t));
    } else {
        fresh.ids[0] = take_short(self, (uint32_t)count);
        memcpy(self->short_arena + fresh.ids[0], out, count * sizeof(uint32_t));
    }
    bucket[1] = bucket[0];
    bucket[0] = fresh;
    self->out_used += count;
    return 0;
}

static uint64_t hash_bytes(const uint8_t *word, size_t length)
{
    uint64_t hash = length, tail[2];
    size_t i = 0;
    for (; i + 16 < length; i += 16) {
        memcpy(tail, word + i, 16);
        hash = mix(tail[0] ^ hash, tail[1]);
    }
    memcpy(tail, word + length - 16, 16);
    return mix(tail[0] ^ hash, tail[1]);
}

static int encode_long(Encoder *self, const uint8_t *word, size_t length)
{
    uint32_t *out = self->out + self->out_used;
    if (length > LONG_WORD) {
        Py_ssize_t count = merge_long(self, word, length, out);
        if (count < 0)
            return -1;
        self->out_used += (size_t)count;
        return 0;
    }
    uint64_t hash = hash_bytes(word, length);
    LongSlot *slot = &self->long_words[hash >> (64 - LONG_BITS)];
    if (slot->length == length && slot->hash == hash && memcmp(self->long_arena + slot->word, word, length) == 0) {
        memcpy(out, self->long_arena + slot->ids, slot->count * sizeof(uint32_t));
        self->out_used += slot->count;
        return 0;
    }
    Py_ssize_t count;
    if (length <= SCAN_SYMBOLS)
        count = (Py_ssize_t)merge_short(self, word, length, out);
    else if ((count = merge_long(self, word, length, out)) < 0)
        return -1;
    uint32_t words = (uint32_t)((length + 3) / 4);
    uint32_t place = take_long(self, words + (uint32_t)count);
    memcpy(self->long_arena + place, word, length);
    memcpy(self->long_arena + place + words, out, (size_t)count * sizeof(uint32_t));
    *slot = (LongSlot){hash, place, place + words, (uint32_t)length, (uint32_t)count};
    self->out_used += (size_t)count;
    return 0;
}

static int encode_part(Encoder *self, const uint8_t *word, size_t length, const uint8_t *end, const Sink *sink)
{
    if (length > self->window)
        return encode_windows(self, word, length, sink);
    /* No word has more ids than bytes. Without a sink there is room for the whole text. */
    if (sink && ((self->out_used >= self->piece && hand_out(self, sink, self->out_used, word) < 0) ||
                 reserve_out(self, length) < 0))
        return -1;
    if (length == 1) {
        self->out[self->out_used++] = self->byte_ids[*word];
        return 0;
    }
    return length <= SHORT_WORD ? encode_short(self, word, length, end) : encode_long(self, word, length);
}

/* One word; `end` is the end of the text. A word is cut where no merge can ever join what is left and right of the
 * cut, which changes nothing but turns long words, such as sentences without spaces, into short ones. */
static int encode_word(Encoder *self, const uint8_t *word, size_t length, const uint8_t *end, const Sink *sink)
{
    if (length <= SHORT_WORD && word[length - 1] < 0x80)
        return encode_part(self, word, length, end, sink);
    size_t start = 0;
    for (size_t i = 1; i < length; i++)
        if (!self->may_cross[(size_t)word[i - 1] << 8 | word[i]]) {
            if (encode_part(self, word + start, i - start, end, sink) < 0)
                return -1;
            start = i;
        }
    return encode_part(self, word + start, length - start, end, sink);
}

/* ---- splitting a text into words ---- */

/* Class of the character at `p`, and its bytes. The text is valid UTF-8. */
static inline unsigned class_at(const Encoder *self, const uint8_t *p, size_t *bytes)
{
    uint32_t c = *p;
    if (c < 0x80) {
        *bytes = 1;
    } else if (c < 0xE0) {
        c = (c & 0x1F) << 6 | (p[1] & 0x3F);
        *bytes = 2;
    } else if (c < 0xF0) {
        c = (c & 0x0F) << 12 | (uint32_t)(p[1] & 0x3F) << 6 | (p[2] & 0x3F);
        *bytes = 3;
    } else {
        c = (c & 0x07) << 18 | (uint32_t)(p[1] & 0x3F) << 12 | (uint32_t)(p[2] & 0x3F) << 6 | (p[3] & 0x3F);
        *bytes = 4;
    }
    return self->classes[c];
}

static inline const uint8_t *skip_class(const Encoder *self, const uint8_t *p, const uint8_t *end, unsigned class)
{
    size_t bytes;
    while (p < end && class_at(self, p, &bytes) == class)
        p += bytes;
    return p;
}

/* Bytes of a contraction after an apostrophe at `p`, or 0. */
static inline size_t contraction(const uint8_t *p, const uint8_t *end)
{
    if (end - p >= 2) {
        uint8_t a = p[1];
        if (a == 's' || a == 't' || a == 'm' || a == 'd')
            return 2;
        if (end - p >= 3) {
            uint8_t b = p[2];
            if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l'))
                return 3;
        }
    }
    return 0;
}

static int reserve_out(Encoder *self, size_t more)
{
    size_t needed = self->out_used + more + INLINE_IDS;
    if (needed <= self->out_size)
        return 0;
    size_t size = self->out_size * 2 > needed ? self->out_size * 2 : needed;
    uint32_t *grown = realloc(self->out, size * sizeof(uint32_t));
    if (!grown) {
        PyErr_NoMemory();
        return -1;
    }
    self->out = grown;
    self->out_size = size;
    return 0;
}

/* Hands the first `count` ids to the sink, in pieces or none, with the bytes of the text that were read. It may use this
 * encoder. The others stay, at the beginning of `out`. */
static int hand_out(Encoder *self, const Sink *sink, size_t count, const uint8_t *read)
{
    uint32_t *out = self->out; /* not the encoder's while Python runs */
    size_t stay = self->out_used - count, at = 0;
    self->out = NULL;
    self->out_used = self->out_size = 0;
    int failed;
    do {
        size_t some = count - at < self->piece ? count - at : self->piece;
        PyObject *ids = PyByteArray_FromStringAndSize((const char *)(out + at), (Py_ssize_t)(some * sizeof(uint32_t)));
        PyObject *answer = ids ? PyObject_CallFunction(sink->call, "Nn", ids, (Py_ssize_t)(read - sink->begin)) : NULL;
        failed = !answer;
        Py_XDECREF(answer);
        at += some;
    } while (at < count && !failed);
    self->out_used = 0; /* the sink may have used it */
    if (!failed && stay > 0 && !(failed = reserve_out(self, stay) < 0)) {
        memcpy(self->out, out + count, stay * sizeof(uint32_t));
        self->out_used = stay;
    }
    free(out);
    return failed ? -1 : 0;
}

/* Tells the sink of a long stretch that was read since `*told`: a word may have no end for long. */
static inline int tell(Encoder *self, const Sink *sink, const uint8_t *read, const uint8_t **told)
{
    if ((size_t)(read - *told) < self->piece * LOOKED_AT)
        return 0;
    *told = read;
    return hand_out(self, sink, self->out_used, read);
}

/* `skip_class` that tells the sink, if there is one. NULL with an exception. */
static inline const uint8_t *skip_word(Encoder *self, const uint8_t *p, const uint8_t *end, unsigned class,
                                       const Sink *sink)
{
    if (!sink)
        return skip_class(self, p, end, class);
    for (const uint8_t *told = p;;) {
        const uint8_t *stop = (size_t)(end - p) > self->piece * LOOKED_AT ? p + self->piece * LOOKED_AT : end;
        p = skip_class(self, p, stop, class);
        if (p < stop || p >= end)
            return p;
        if (tell(self, sink, p, &told) < 0)
            return NULL;
    }
}

/* Walks over the words of a text: keeps where each ends, or its ids, or hands them to a sink. */
static inline __attribute__((always_inline)) int walk(Encoder *self, const uint8_t *p, size_t length, int ends_only,
                                                      const Sink *sink)
{
    const uint8_t *begin = p, *end = p + length;
    while (p < end) {
        size_t bytes, following;
        unsigned class = class_at(self, p, &bytes);
        const uint8_t *q = p + bytes;
        if (*p == ' ' && q < end) {
            class = class_at(self, q, &following);
            if (class == SPACE || class == DIGIT)
                class = SPACE;
            else
                q = skip_word(self, q + following, end, class, sink);
        } else if (*p == '\'' && (following = contraction(p, end)) != 0) {
            q = p + following;
        } else if (class != SPACE && class != DIGIT) {
            q = skip_word(self, q, end, class, sink);
        }
        if (!q)
            return -1;
        if (class == SPACE) {
            const uint8_t *last = p, *told = p; /* the last space of the run */
            unsigned after = SPACE;
            while (q < end && (after = class_at(self, q, &following)) == SPACE) {
                last = q;
                q += following;
                if (sink && tell(self, sink, q, &told) < 0)
                    return -1;
            }
            /* The last space of a run goes to the word that follows, if one does in this piece. */
            if (q < end && after != DIGIT && last > p)
                q = last;
        }
        if (ends_only)
            self->out[self->out_used++] = (uint32_t)(q - begin);
        else if (encode_word(self, p, (size_t)(q - p), end, sink) < 0)
            return -1;
        p = q;
    }
    return sink && self->out_used > 0 ? hand_out(self, sink, self->out_used, end) : 0;
}

static int encode_text(Encoder *self, const uint8_t *text, size_t length)
{
    return walk(self, text, length, 0, NULL);
}

static int split_text(Encoder *self, const uint8_t *text, size_t length)
{
    return walk(self, text, length, 1, NULL);
}

static int encode_in_pieces(Encoder *self, const uint8_t *text, size_t length, PyObject *call)
{
    Sink sink = {call, text};
    return walk(self, text, length, 0, &sink);
}

/* ---- the Python type ---- */

PyDoc_STRVAR(encode_batch_doc,
"encode_batch(texts: list[str]) -> tuple[bytearray, bytearray]\n\n"
"uint32 ids of all texts, one after the other, and int64 numbers of ids of each text.\n"
"Raises UnicodeEncodeError for a text with a lone surrogate.");

static void release_out(Encoder *self)
{
    if (self->out_size * sizeof(uint32_t) > KEPT_SCRATCH) {
        free(self->out);
        self->out = NULL;
        self->out_size = 0;
    }
}

static PyObject *Encoder_encode_batch(Encoder *self, PyObject *texts)
{
    if (!PyList_Check(texts)) {
        PyErr_SetString(PyExc_TypeError, "texts must be a list");
        return NULL;
    }
    Py_ssize_t count = PyList_GET_SIZE(texts);
    PyObject *ids = NULL, *lengths = PyByteArray_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(int64_t));
    if (!lengths)
        return NULL;
    self->out_used = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        Py_ssize_t length;
        const char *text = PyUnicode_AsUTF8AndSize(PyList_GET_ITEM(texts, i), &length);
        size_t before = self->out_used;
        /* No text has more ids than bytes. */
        if (!text || reserve_out(self, (size_t)length) < 0 ||
            encode_text(self, (const uint8_t *)text, (size_t)length) < 0)
            goto done;
        int64_t number = (int64_t)(self->out_used - before);
        memcpy(PyByteArray_AS_STRING(lengths) + i * (Py_ssize_t)sizeof number, &number, sizeof number);
    }
    ids = PyByteArray_FromStringAndSize((const char *)self->out, (Py_ssize_t)(self->out_used * sizeof(uint32_t)));
done:
    release_out(self);
    if (!ids) {
        Py_DECREF(lengths);
        return NULL;
    }
    return Py_BuildValue("(NN)", ids, lengths);
}

PyDoc_STRVAR(encode_long_doc,
"encode_long(text: Buffer, sink: Callable[[bytearray, int], object]) -> None\n\n"
"`sink` gets the uint32 ids of a text of valid UTF-8 in pieces, some of them empty, each with the number of bytes of the\n"
"text that were read; a few, and those of a word whose end was looked for, are read again.\n"
"Raises ValueError for a text that ends inside a character, and what `sink` raises.");

/* Whether a text ends with its last character. The walk never reads past the end of one that does, valid or not. */
static int ends_whole(const uint8_t *text, size_t length)
{
    for (size_t back = 1; back <= 4 && back <= length; back++) {
        uint8_t byte = text[length - back];
        if ((byte & 0xC0) == 0x80)
            continue;
        return back == (byte < 0x80 ? 1u : byte < 0xE0 ? 2u : byte < 0xF0 ? 3u : 4u);
    }
    return length == 0;
}

static PyObject *Encoder_encode_long(Encoder *self, PyObject *args)
{
    Py_buffer text;
    PyObject *sink;
    if (!PyArg_ParseTuple(args, "y*O", &text, &sink))
        return NULL;
    int failed;
    if (!ends_whole(text.buf, (size_t)text.len)) {
        PyErr_SetString(PyExc_ValueError, "the text ends inside a character");
        failed = 1;
    } else {
        self->out_used = 0; /* what an earlier call that failed has left */
        failed = encode_in_pieces(self, text.buf, (size_t)text.len, sink) < 0;
    }
    PyBuffer_Release(&text);
    release_out(self);
    if (failed)
        return NULL;
    Py_RETURN_NONE;
}

PyDoc_STRVAR(split_doc,
"split(text: str) -> bytearray\n\n"
"uint32 ends of the words of a text, in bytes of its UTF-8. Raises ValueError for a text of 4 GiB or more.");

static PyObject *Encoder_split(Encoder *self, PyObject *object)
{
    Py_ssize_t length;
    const char *text = PyUnicode_AsUTF8AndSize(object, &length);
    if (!text)
        return NULL;
    if ((uint64_t)length >= UINT32_MAX) {
        PyErr_SetString(PyExc_ValueError, "a text of 4 GiB or more");
        return NULL;
    }
    self->out_used = 0;
    if (reserve_out(self, (size_t)length) < 0 || split_text(self, (const uint8_t *)text, (size_t)length) < 0)
        return NULL;
    PyObject *ends =
        PyByteArray_FromStringAndSize((const char *)self->out, (Py_ssize_t)(self->out_used * sizeof(uint32_t)));
    release_out(self);
    return ends;
}

/* How far what follows a word's beginning u can reach into its tokens: those that end so many bytes before the end of u
 * are the same whatever follows.
 *
 * Compare the merges of u with those of uv, rank by rank, and let q be a place up to which both hold the same tokens:
 * |u| at first. All merges of one rank r, of x and y, are done before one of a higher rank, from left to right. As long as
 * they end before q both do the same ones. If no pair of a lower rank has the token xy in it, the only other one is that of
 * the token x that ends at q: the place moves by the bytes of x. If there is such a pair, the new token may at once be
 * merged further, with what is left or right of it; but each token that comes after the first that is not in both holds a
 * byte at or behind the last one before q, as each pair of a rank up to r is further right or has the newest token in it.
 * So it begins no more than the bytes L of the longest token before q, and the end of a token that stands before there is
 * less than L away. Summed over all ranks. Merges of trained tokenizers hardly ever use a token before it is made. */
static int add_reach(Encoder *self, const uint32_t *merges, size_t count, size_t ids)
{
    uint32_t *used = malloc(ids * sizeof(uint32_t)); /* the lowest rank that an id is merged in */
    if (!used)
        return -1;
    uint32_t longest = 1;
    for (size_t id = 0; id < ids; id++) {
        used[id] = NO_RANK;
        longest = self->bytes_of_id[id] > longest ? self->bytes_of_id[id] : longest;
    }
    for (size_t rank = count; rank-- > 0;)
        used[merges[rank * 4]] = used[merges[rank * 4 + 1]] = (uint32_t)rank;
    for (size_t rank = 0; rank < count; rank++) {
        const uint32_t *merge = merges + rank * 4;
        self->unsettled += used[merge[2]] < rank ? 2 * (Py_ssize_t)longest : (Py_ssize_t)self->bytes_of_id[merge[0]];
    }
    free(used);
    return 0;
}

static int add_merges(Encoder *self, const uint32_t *merges, const uint8_t *edges, size_t count)
{
    size_t slots = 1024;
    while (slots < count * 3)
        slots *= 2;
    uint32_t most = 0;
    for (size_t byte = 0; byte < 256; byte++)
        most = self->byte_ids[byte] > most ? self->byte_ids[byte] : most;
    for (size_t rank = 0; rank < count; rank++)
        most = merges[rank * 4 + 2] > most ? merges[rank * 4 + 2] : most;
    self->merges = malloc(slots * sizeof(MergeSlot));
    self->merged_of_rank = malloc((count + 1) * sizeof(uint32_t));
    self->byte_ranks = malloc(65536 * sizeof(uint32_t));
    self->may_cross = calloc(65536, 1);
    self->bytes_of_id = calloc((size_t)most + 1, sizeof(uint32_t));
    if (!self->merges || !self->merged_of_rank || !self->byte_ranks || !self->may_cross || !self->bytes_of_id)
        return -1;
    for (size_t byte = 0; byte < 256; byte++)
        self->bytes_of_id[self->byte_ids[byte]] = 1;
    self->merge_mask = slots - 1;
    for (size_t i = 0; i < slots; i++)
        self->merges[i] = (MergeSlot){UINT64_MAX, NO_RANK, 0};
    for (size_t rank = 0; rank < count; rank++) {
        const uint32_t *merge = merges + rank * 4;
        MergeSlot *slot = (MergeSlot *)find_merge(self, merge[0], merge[1]);
        *slot = (MergeSlot){(uint64_t)merge[0] << 32 | merge[1], (uint32_t)rank, merge[2]};
        self->merged_of_rank[rank] = merge[2];
        self->bytes_of_id[merge[2]] = merge[3];
        self->may_cross[(size_t)edges[rank * 2] << 8 | edges[rank * 2 + 1]] = 1;
    }
    for (size_t left = 0; left < 256; left++)
        for (size_t right = 0; right < 256; right++)
            self->byte_ranks[left << 8 | right] = rank_of(self, self->byte_ids[left], self->byte_ids[right]);
    return add_reach(self, merges, count, (size_t)most + 1);
}

PyDoc_STRVAR(Encoder_doc,
"Encoder(classes: bytes, byte_ids: bytes, merges: bytes, edges: bytes, cache_bits: int, window: int, piece: int)\n\n"
"classes: uint8[0x110000], a code of this module for each character. byte_ids: uint32[256], id of each byte.\n"
"merges: uint32[merges, 4], left, right and merged id and the bytes of the merged token, in order of rank. edges:\n"
"uint8[merges, 2], the last byte of each left and the first byte of each right token. cache_bits: logarithm of the\n"
"buckets (64 bytes each) for short words. window: bytes of a word that are merged at one time, 16 or more. piece: ids\n"
"that `encode_long` hands out at one time, at most.");

static PyObject *Encoder_new(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    static char *names[] = {"classes", "byte_ids", "merges", "edges", "cache_bits", "window", "piece", NULL};
    const char *classes, *byte_ids, *merges, *edges;
    Py_ssize_t classes_size, byte_ids_size, merges_size, edges_size;
    int cache_bits;
    Py_ssize_t window, piece;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "y#y#y#y#inn", names, &classes, &classes_size, &byte_ids,
                                     &byte_ids_size, &merges, &merges_size, &edges, &edges_size, &cache_bits, &window,
                                     &piece))
        return NULL;
    Py_ssize_t count = merges_size / 16;
    if (classes_size != CHARACTERS || byte_ids_size != 1024 || merges_size != count * 16 || edges_size != count * 2 ||
        cache_bits < 4 || cache_bits > 24 || window < SHORT_WORD + 1 || piece < 1 || (size_t)count >= NO_RANK) {
        PyErr_SetString(PyExc_ValueError, "a table of the wrong size");
        return NULL;
    }
    Encoder *self = (Encoder *)type->tp_alloc(type, 0); /* zero-filled */
    if (!self)
        return NULL;
    memcpy(self->byte_ids, byte_ids, 1024);
    self->short_buckets = (size_t)1 << cache_bits;
    self->short_shift = 64 - (unsigned)cache_bits;
    self->window = (size_t)window;
    self->piece = (size_t)piece;
    self->classes = calloc(CLASSES, 1);
    self->short_words = calloc(self->short_buckets * 2, sizeof(ShortSlot));
    self->long_words = calloc((size_t)1 << LONG_BITS, sizeof(LongSlot));
    self->short_arena = malloc(ARENA_IDS * sizeof(uint32_t));
    self->long_arena = malloc(ARENA_IDS * sizeof(uint32_t));
    uint32_t *aligned = malloc((size_t)merges_size + 1);
    int failed = !self->classes || !self->short_words || !self->long_words || !self->short_arena ||
                 !self->long_arena || !aligned;
    if (!failed) {
        memcpy(self->classes, classes, CHARACTERS);
        memcpy(aligned, merges, (size_t)merges_size);
        failed = add_merges(self, aligned, (const uint8_t *)edges, (size_t)count) < 0;
    }
    free(aligned);
    if (failed) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void Encoder_dealloc(Encoder *self)
{
    PyTypeObject *type = Py_TYPE(self);
    free(self->classes);
    free(self->byte_ranks);
    free(self->may_cross);
    free(self->merges);
    free(self->merged_of_rank);
    free(self->bytes_of_id);
    free(self->short_words);
    free(self->long_words);
    free(self->short_arena);
    free(self->long_arena);
    free(self->out);
    free_scratch(self);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMethodDef Encoder_methods[] = {
    {"encode_batch", (PyCFunction)Encoder_encode_batch, METH_O, encode_batch_doc},
    {"encode_long", (PyCFunction)Encoder_encode_long, METH_VARARGS, encode_long_doc},
    {"split", (PyCFunction)Encoder_split, METH_O, split_doc},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef Encoder_members[] = {
    {"unsettled", T_PYSSIZET, offsetof(Encoder, unsettled), READONLY,
     "Bytes at the end of a word's beginning whose ids may be others once more of the word follows; at most so many."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot Encoder_slots[] = {
    {Py_tp_doc, (void *)Encoder_doc},
    {Py_tp_new, Encoder_new},
    {Py_tp_dealloc, Encoder_dealloc},
    {Py_tp_methods, Encoder_methods},
    {Py_tp_members, Encoder_members},
    {0, NULL},
};

static PyType_Spec Encoder_spec = {"data_prep._byte_level.Encoder", sizeof(Encoder), 0, Py_TPFLAGS_DEFAULT,
                                   Encoder_slots};

static int module_exec(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &Encoder_spec, NULL);
    if (!type || PyModule_AddObjectRef(module, "Encoder", type) < 0) {
        Py_XDECREF(type);
        return -1;
    }
    Py_DECREF(type);
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_byte_level", "Byte-level BPE; see data_prep/byte_level.py.", 0, NULL, module_slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__byte_level(void)
{
    return PyModuleDef_Init(&module);
}
