// What the shell (bindings.cpp) uses of nanobind, without Python: a module is a table of functions that take integers,
// floats and addresses, so that the compiled kernels also run as a program, on an emulated processor or under sanitizers.
#pragma once

#include <bit>
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace nanobind {

struct gil_scoped_release {};
template <class Guard>
struct call_guard {};
struct arg {};
namespace literals {
inline arg operator""_a(const char*, size_t) {
    return {};
}
}  // namespace literals

// An argument is 8 bytes: an integer, an address, or a double. A result is written out.
template <class T>
T from_bits(uint64_t bits) {
    if constexpr (std::is_floating_point_v<T>)
        return static_cast<T>(std::bit_cast<double>(bits));
    else
        return static_cast<T>(bits);
}
inline std::string written(int64_t result) {
    return std::to_string(result);
}
inline std::string written(const std::vector<std::string>& result) {
    std::string words;
    for (const std::string& word : result) words += (words.empty() ? "" : " ") + word;
    return words;
}

struct module_ {
    std::string text;
    std::map<std::string, std::function<std::string(const std::vector<uint64_t>&)>> functions;

    std::string& doc() { return text; }

    template <class Result, class... Arguments, class... Extra>
    void def(const char* name, Result (*function)(Arguments...), const Extra&...) {
        functions[name] = [=](const std::vector<uint64_t>& given) {
            if (given.size() != sizeof...(Arguments))
                throw std::runtime_error(std::string(name) + " takes " + std::to_string(sizeof...(Arguments)) +
                                         " arguments; got " + std::to_string(given.size()) + ".");
            return [&]<size_t... i>(std::index_sequence<i...>) {
                if constexpr (std::is_void_v<Result>)
                    return function(from_bits<Arguments>(given[i])...), std::string();
                else
                    return written(function(from_bits<Arguments>(given[i])...));
            }(std::index_sequence_for<Arguments...>());
        };
    }
};

}  // namespace nanobind

#define NB_MODULE(name, variable) void define_module(nanobind::module_& variable)
