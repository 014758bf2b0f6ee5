// The compiled kernels as a program: answers calls of the shell's functions on standard input until that ends.
//
// A call is a word (the function). `backends` takes nothing more; for all others follow the number of the backend, that of
// threads, the size of the struct of arguments and its bytes, the number of its pointers, and for each its place in the struct, its
// size and its bytes. All numbers are 8 bytes, little-endian. The pointers are set to pieces of memory that are exactly as large as
// the bytes, so that a sanitizer sees what reaches beyond. The answer is a line of text, empty but for `backends`, and behind it
// the bytes of every pointer as they are after the call.
#include <nanobind/nanobind.h>

#include <cstring>
#include <iostream>
#include <memory>

NB_MODULE(_cpu, module);

namespace {

uint64_t read_number() {
    uint64_t number = 0;
    std::cin.read(reinterpret_cast<char*>(&number), sizeof(number));
    return number;
}

struct Bytes {
    std::unique_ptr<char[]> memory;
    std::streamsize size;
};

Bytes read_bytes(uint64_t size) {
    Bytes bytes{std::make_unique<char[]>(size), static_cast<std::streamsize>(size)};
    std::cin.read(bytes.memory.get(), bytes.size);
    return bytes;
}

}  // namespace

int main() {
    nanobind::module_ module;
    define_module(module);
    for (std::string name; std::getline(std::cin, name);) {
        std::vector<uint64_t> arguments;
        std::vector<Bytes> tensors;
        Bytes structure{};
        if (name != "backends") {
            const uint64_t backend = read_number(), n_threads = read_number();
            structure = read_bytes(read_number());
            for (uint64_t left = read_number(); left > 0; --left) {
                const uint64_t place = read_number();
                tensors.push_back(read_bytes(read_number()));
                const char* memory = tensors.back().memory.get();
                std::memcpy(structure.memory.get() + place, &memory, sizeof(memory));
            }
            arguments = {backend, reinterpret_cast<uintptr_t>(structure.memory.get()), n_threads};
        }
        std::cout << module.functions.at(name)(arguments) << '\n';
        for (const Bytes& tensor : tensors) std::cout.write(tensor.memory.get(), tensor.size);
        std::cout.flush();
    }
}
