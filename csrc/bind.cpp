// The one binding: raw addresses in, nothing out. Shapes, types and devices are checked by kernels/rows.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "policy_loss.h"

namespace py = pybind11;
using Address = uintptr_t;

template <class T>
static T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

template <class Call>
static void launch(const Call& call) {
    int error;
    {
        py::gil_scoped_release unlocked;
        error = call();
    }
    if (error) throw std::runtime_error(std::string("policy loss kernel: ") + klear_error_string(error));
}

static void bind_structs(py::module_& module) {
    py::class_<klear_logits>(module, "Logits")
        .def(py::init([](Address logits, Address gradient, int64_t logits_stride, int64_t gradient_stride, int64_t rows,
                         int64_t columns, int64_t valid_columns, int64_t vocab_start, int logits_type,
                         int gradient_type) {
                 return klear_logits{at<void>(logits), at<void>(gradient), logits_stride, gradient_stride, rows,
                                     columns, valid_columns, vocab_start, logits_type, gradient_type};
             }),
             py::kw_only(), py::arg("logits"), py::arg("gradient"), py::arg("logits_stride"),
             py::arg("gradient_stride"), py::arg("rows"), py::arg("columns"), py::arg("valid_columns"),
             py::arg("vocab_start"), py::arg("logits_type"), py::arg("gradient_type"));
    py::class_<klear_tokens>(module, "Tokens")
        .def(py::init([](Address targets, Address policy_weights, Address nll_weights, Address old_logprobs,
                         Address advantages, Address ref_logprobs, Address temperatures, float temperature) {
                 return klear_tokens{at<int64_t>(targets),      at<float>(policy_weights), at<float>(nll_weights),
                                     at<float>(old_logprobs),   at<float>(advantages),     at<float>(ref_logprobs),
                                     at<float>(temperatures),   temperature};
             }),
             py::kw_only(), py::arg("targets"), py::arg("policy_weights"), py::arg("nll_weights"),
             py::arg("old_logprobs"), py::arg("advantages"), py::arg("ref_logprobs"), py::arg("temperatures"),
             py::arg("temperature"));
    py::class_<klear_coefficients>(module, "Coefficients")
        .def(py::init([](int kind, float ratio_low, float ratio_high, float beta_low, float beta_high, float dual_clip,
                         float entropy_coefficient, float kl_coefficient, int kl_estimator) {
                 return klear_coefficients{kind,      ratio_low,           ratio_high,     beta_low,    beta_high,
                                           dual_clip, entropy_coefficient, kl_coefficient, kl_estimator};
             }),
             py::kw_only(), py::arg("kind"), py::arg("ratio_low"), py::arg("ratio_high"), py::arg("beta_low"),
             py::arg("beta_high"), py::arg("dual_clip"), py::arg("entropy_coefficient"), py::arg("kl_coefficient"),
             py::arg("kl_estimator"));
    py::class_<klear_outputs>(module, "Outputs")
        .def(py::init([](Address logprobs, Address entropy, Address lse, Address ratio, Address loss, Address region,
                         Address status) {
                 return klear_outputs{at<float>(logprobs), at<float>(entropy),  at<float>(lse),     at<float>(ratio),
                                      at<float>(loss),     at<uint8_t>(region), at<uint8_t>(status)};
             }),
             py::kw_only(), py::arg("logprobs"), py::arg("entropy"), py::arg("lse"), py::arg("ratio"), py::arg("loss"),
             py::arg("region"), py::arg("status"));
}

// klear_peers with the list that it points to.
struct Peers {
    std::vector<int64_t> mailboxes;
    klear_peers peers;
};

static void bind_peers(py::module_& module) {
    py::class_<Peers>(module, "Peers")
        .def(py::init([](std::vector<int64_t> mailboxes, Address ticket, int64_t capacity, int64_t timeout_ns,
                         int64_t generation, int rank) {
                 auto made = std::make_unique<Peers>();
                 made->mailboxes = std::move(mailboxes);
                 made->peers = {made->mailboxes.data(), at<uint32_t>(ticket), capacity, timeout_ns, generation,
                                static_cast<int32_t>(made->mailboxes.size()), rank};
                 return made;
             }),
             py::kw_only(), py::arg("mailboxes"), py::arg("ticket"), py::arg("capacity"), py::arg("timeout_ns"),
             py::arg("generation"), py::arg("rank"));
}

static void bind_cpu(py::module_& module) {
    module.def("cpu_rows", [](const klear_logits& logits, const klear_tokens& tokens, const klear_coefficients& loss,
                              const klear_outputs& out, int threads) {
        launch([&] { return klear_cpu_rows(&logits, &tokens, &loss, &out, threads); });
    });
    module.def("cpu_stats", [](const klear_logits& logits, const klear_tokens& tokens, Address stats, int threads) {
        launch([&] { return klear_cpu_stats(&logits, &tokens, at<float>(stats), threads); });
    });
    module.def("cpu_combine", [](Address stats, int64_t ranks, int64_t rows, Address combined) {
        launch([&] { return klear_cpu_combine(at<float>(stats), ranks, rows, at<float>(combined)); });
    });
    module.def("cpu_finish", [](const klear_logits& logits, const klear_tokens& tokens, const klear_coefficients& loss,
                                Address combined, const klear_outputs& out, int threads) {
        launch([&] { return klear_cpu_finish(&logits, &tokens, &loss, at<float>(combined), &out, threads); });
    });
    module.def("cpu_isa", &klear_cpu_isa);
}

static void bind_cuda(py::module_& module) {
    module.def("cuda_rows", [](const klear_logits& logits, const klear_tokens& tokens, const klear_coefficients& loss,
                               const klear_outputs& out, int row_kernel, int device, Address stream) {
        launch([&] { return klear_cuda_rows(&logits, &tokens, &loss, &out, row_kernel, device, at<void>(stream)); });
    });
    module.def("cuda_stats", [](const klear_logits& logits, const klear_tokens& tokens, Address stats, int device, Address stream) {
        launch([&] { return klear_cuda_stats(&logits, &tokens, at<float>(stats), device, at<void>(stream)); });
    });
    module.def("cuda_combine", [](Address stats, int64_t ranks, int64_t rows, Address combined, int device, Address stream) {
        launch([&] {
            return klear_cuda_combine(at<float>(stats), ranks, rows, at<float>(combined), device, at<void>(stream));
        });
    });
    module.def("cuda_finish", [](const klear_logits& logits, const klear_tokens& tokens, const klear_coefficients& loss,
                                 Address combined, const klear_outputs& out, int device, Address stream) {
        launch([&] {
            return klear_cuda_finish(&logits, &tokens, &loss, at<float>(combined), &out, device, at<void>(stream));
        });
    });
    module.def("cuda_sharded_rows", [](const klear_logits& logits, const klear_tokens& tokens,
                                       const klear_coefficients& loss, const klear_outputs& out, const Peers& peers,
                                       int device, Address stream) {
        launch([&] {
            return klear_cuda_sharded_rows(&logits, &tokens, &loss, &out, &peers.peers, device, at<void>(stream));
        });
    });
    module.def("cuda_sharded_fits", [](const klear_logits& logits, int device) {
        const int error = klear_cuda_sharded_fits(&logits, device);
        return std::string(error ? klear_error_string(error) : "");
    });
    module.def("cuda_mailbox_bytes", &klear_cuda_mailbox_bytes);
    module.def("cuda_archs", &klear_cuda_archs);
    module.def("cuda_devices", [] {
        int count = 0;
        const int error = klear_cuda_device_count(&count);
        return py::make_tuple(error ? 0 : count, std::string(error ? klear_error_string(error) : ""));
    });
}

PYBIND11_MODULE(_policy_loss, module) {
    module.doc() = "Row kernels of the fused policy loss; called through megatron_klear.kernels.rows.";
    bind_structs(module);
    bind_peers(module);
    bind_cpu(module);
    bind_cuda(module);
}
