// Packing: code i <-> bits [i * bits, (i + 1) * bits) of a dense little-endian stream (codes.h).
//
// One thread handles a range of blocks of 8 codes, `bits` bytes each, so no two threads write one byte. A word of 8
// bytes is moved per block, the bytes beyond the block being overwritten by the next one; where that would leave the
// range (or the buffer, when reading), exactly `bits` bytes are moved. Bytes moved per code: 1 + bits / 8. Bound:
// memory, in large tensors.
#include "codes.h"
#include "kernels.h"

namespace mpsearch::MPSEARCH_ISA {

template <int bits>
static uint8_t pack_blocks(const uint8_t* codes, uint8_t* packed, int64_t numel, int64_t begin, int64_t end) {
    const int64_t whole_end = end < numel / 8 ? end : numel / 8;  // blocks with all 8 codes
    const int64_t spill = (8 + bits - 1) / bits;  // a word written at block i reaches into i + spill - 1
    int64_t block = begin;
    Words seen = {};
    for (; block + kWords - 1 + spill <= whole_end; block += kWords) {
        Words words;
        memcpy(&words, codes + 8 * block, sizeof(words));
        seen |= words;
        words = compress<bits>(words);
        for (int i = 0; i < kWords; ++i) {
            const uint64_t word = words[i];
            memcpy(packed + bits * (block + i), &word, sizeof(word));
        }
    }
    uint64_t all = 0;
    for (int i = 0; i < kWords; ++i) all |= seen[i];
    for (; block < end; ++block) {
        const int64_t n = numel - 8 * block < 8 ? numel - 8 * block : 8;
        uint64_t word = 0;
        memcpy(&word, codes + 8 * block, n);
        all |= word;
        word = compress<bits>(word);
        memcpy(packed + bits * block, &word, (n * bits + 7) / 8);
    }
    for (int shift = 32; shift >= 8; shift /= 2) all |= all >> shift;
    return static_cast<uint8_t>(all);
}

template <int bits>
static void unpack_blocks(const uint8_t* packed, uint8_t* codes, int64_t numel, int64_t begin, int64_t end) {
    const int64_t packed_bytes = (numel * bits + 7) / 8;
    const int64_t whole_end = end < numel / 8 ? end : numel / 8;
    int64_t block = begin;
    for (; block + kWords <= whole_end && bits * (block + kWords - 1) + 8 <= packed_bytes; block += kWords) {
        Words words;
        for (int i = 0; i < kWords; ++i) {
            uint64_t word;
            memcpy(&word, packed + bits * (block + i), sizeof(word));
            words[i] = word;
        }
        words = expand<bits>(words);
        memcpy(codes + 8 * block, &words, sizeof(words));
    }
    for (; block < end; ++block) {
        const int64_t n = numel - 8 * block < 8 ? numel - 8 * block : 8;
        uint64_t word = 0;
        memcpy(&word, packed + bits * block, (n * bits + 7) / 8);
        word = expand<bits>(word);
        memcpy(codes + 8 * block, &word, n);
    }
}

uint8_t pack(const PackArguments& job, int64_t begin, int64_t end) {
    uint8_t seen = 0;
    with_bits(job.bits, [&]<int width>() { seen = pack_blocks<width>(job.source, job.target, job.numel, begin, end); });
    return seen;
}

void unpack(const PackArguments& job, int64_t begin, int64_t end) {
    with_bits(job.bits, [&]<int width>() { unpack_blocks<width>(job.source, job.target, job.numel, begin, end); });
}

void unpack_codes(const uint8_t* packed, uint8_t* codes, int64_t numel, int bits) {
    with_bits(bits, [&]<int width>() { unpack_blocks<width>(packed, codes, numel, 0, (numel + 7) / 8); });
}

}  // namespace mpsearch::MPSEARCH_ISA
