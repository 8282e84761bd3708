// Lets autograd and torch.compile handle FAKE cuda tensors, which have no data, in a torch that was built without CUDA.
//
// Two places in such a torch refuse: the table of device guards has none for CUDA, and CUDA's hooks say that there is no
// CUDA. Here stand a guard that knows one device and one stream and does nothing, and hooks that say yes where autograd
// asks. For tests, in a process of its own: it leans on the inside of one version of torch. See fake_cuda.py.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

struct OneIdleDevice final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return c10::Device(CUDA, 0); }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, c10::Device(CUDA, 0));
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return getStream(stream.device()); }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}

  // backward of one stream waits for events of another; nothing runs, so nothing is waited for
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

struct BuiltHooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

OneIdleDevice guard;
BuiltHooks hooks;

}  // namespace

extern "C" void fastbert_install_fake_cuda() {
  c10::impl::device_guard_impl_registry[static_cast<int>(CUDA)].store(&guard);
  // torch has made its hooks on import and keeps them: they get our table of functions
  auto* theirs = const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks());
  *reinterpret_cast<void**>(theirs) = *reinterpret_cast<void**>(&hooks);
}
