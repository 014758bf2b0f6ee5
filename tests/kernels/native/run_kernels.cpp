// The compiled kernels as a program: answers calls of the shell's functions on standard input until that ends.
//
// A call is a word (the function), then the number of arguments, then the arguments; an argument is a letter and 8 bytes:
// `i` an integer, `d` a double, `b` a number of bytes, which follow. All numbers are 8 bytes, little-endian. The function
// gets the address of a piece of memory that is exactly as large as the bytes, so that a sanitizer sees what reaches beyond.
// The answer is the result, a line of text, and behind it the bytes of every `b` argument as they are after the call.
#include <nanobind/nanobind.h>

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
    uint64_t size;
};

}  // namespace

int main() {
    nanobind::module_ module;
    define_module(module);
    for (std::string name; std::getline(std::cin, name);) {
        std::vector<uint64_t> arguments(read_number());
        std::vector<Bytes> tensors;
        for (uint64_t& argument : arguments) {
            const int kind = std::cin.get();
            argument = read_number();
            if (kind != 'b') continue;
            tensors.push_back({std::make_unique<char[]>(argument), argument});
            std::cin.read(tensors.back().memory.get(), static_cast<std::streamsize>(argument));
            argument = reinterpret_cast<uintptr_t>(tensors.back().memory.get());
        }
        std::cout << module.functions.at(name)(arguments) << '\n';
        for (const Bytes& tensor : tensors)
            std::cout.write(tensor.memory.get(), static_cast<std::streamsize>(tensor.size));
        std::cout.flush();
    }
}
