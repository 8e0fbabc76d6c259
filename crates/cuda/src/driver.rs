//! The driver's interface: errors, contexts, streams, memory, launches.

use cudarc::driver::sys::{self, CUresult};
use std::{
    ffi::{CStr, c_void},
    ptr,
    sync::{Mutex, MutexGuard, PoisonError},
    thread::{self, ThreadId},
};
use tegula_kernels::device::{DeviceError, Result};

/// The driver's word for a result.
fn word(result: CUresult) -> String {
    let mut text = ptr::null();
    // SAFETY: the driver writes a pointer to a static string, or null.
    let known = unsafe { sys::cuGetErrorString(result, &raw mut text) };
    if known == CUresult::CUDA_SUCCESS && !text.is_null() {
        // SAFETY: a static C string of the driver.
        let text = unsafe { CStr::from_ptr(text) };
        return format!("{} ({})", text.to_string_lossy(), result as u32);
    }
    format!("error {}", result as u32)
}

/// Turns a result into an error of `device` doing `operation`.
pub(crate) fn check(device: &str, operation: &'static str, result: CUresult) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(DeviceError::Failed {
        device: device.to_owned(),
        operation,
        cause: word(result),
    })
}

/// The number of GPUs; `Ok(0)` where there is no driver.
pub(crate) fn count() -> Result<usize> {
    // cudarc panics on the first call where there is no library.
    // SAFETY: it only tries to open the library.
    if !unsafe { sys::is_culib_present() } {
        return Ok(0);
    }
    // SAFETY: plain calls without preconditions.
    let started = unsafe { sys::cuInit(0) };
    match started {
        CUresult::CUDA_SUCCESS => {}
        CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
        other => {
            let why = format!("the NVIDIA driver can't be used: {}", word(other));
            return Err(DeviceError::Unusable(why));
        }
    }
    new_enough(version()?)?;
    let mut count = 0;
    // SAFETY: writes one integer.
    check("CUDA", "counting devices", unsafe {
        sys::cuDeviceGetCount(&raw mut count)
    })?;
    Ok(count.max(0) as usize)
}

/// The CUDA version that the driver knows, as 1000 · major + 10 · minor.
fn version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: writes one integer.
    check("CUDA", "asking for the driver's version", unsafe {
        sys::cuDriverGetVersion(&raw mut version)
    })?;
    Ok(version)
}

/// Refuses drivers that don't know CUDA 12, by the version that they state.
fn new_enough(version: i32) -> Result<()> {
    if version >= 12_000 {
        return Ok(());
    }
    let (major, minor) = (version / 1000, version % 1000 / 10);
    Err(DeviceError::Unusable(format!(
        "the NVIDIA driver is too old: it knows CUDA {major}.{minor}, and 12.0 is needed"
    )))
}

/// Whether the stream's operations are recorded instead of issued.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Capture {
    No,
    /// By this thread.
    Open(ThreadId),
    /// Something came between that can't be recorded; the stream issues again, and what was
    /// recorded is lost.
    Broken,
}

/// One of a GPU's streams.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stream {
    /// Everything but what says otherwise.
    Work,
    /// Copies beside it.
    Copies,
}

/// One GPU's context with streams of its own.
pub(crate) struct Gpu {
    pub name: String,
    pub description: String,
    pub arch: (i32, i32),
    /// Bytes of shared memory that a block may ask for.
    pub shared: usize,
    capture: Mutex<Capture>,
    ordinal: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    copies: sys::CUstream,
}

// SAFETY: handles of the driver may be used from any thread once the context is current
// there, which every call makes sure of.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver locks what it shares.
unsafe impl Sync for Gpu {}

impl Gpu {
    pub fn open(ordinal: usize, name: &str) -> Result<Gpu> {
        let ck = |what, r| check(name, what, r);
        let mut device = 0;
        let mut text = [0 as std::ffi::c_char; 256];
        let mut context = ptr::null_mut();
        let (mut stream, mut copies) = (ptr::null_mut(), ptr::null_mut());
        let (mut major, mut minor, mut shared) = (0, 0, 0);
        use sys::CUdevice_attribute_enum as A;
        // SAFETY: every call writes to a place of its own of the right size; the name is
        // terminated by the driver.
        unsafe {
            ck(
                "opening it",
                sys::cuDeviceGet(&raw mut device, ordinal as i32),
            )?;
            ck(
                "asking its name",
                sys::cuDeviceGetName(text.as_mut_ptr(), 256, device),
            )?;
            for (value, what) in [
                (
                    &raw mut major,
                    A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                ),
                (
                    &raw mut minor,
                    A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                ),
                (
                    &raw mut shared,
                    A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                ),
            ] {
                ck(
                    "asking its kind",
                    sys::cuDeviceGetAttribute(value, what, device),
                )?;
            }
            ck(
                "opening it",
                sys::cuDevicePrimaryCtxRetain(&raw mut context, device),
            )?;
            ck("opening it", sys::cuCtxSetCurrent(context))?;
            let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
            for stream in [&raw mut stream, &raw mut copies] {
                ck("making a stream", sys::cuStreamCreate(stream, flags))?;
            }
        }
        // SAFETY: the driver terminated it.
        let description = unsafe { CStr::from_ptr(text.as_ptr()) };
        Ok(Gpu {
            name: name.to_owned(),
            description: description.to_string_lossy().into_owned(),
            arch: (major, minor),
            shared: usize::try_from(shared).unwrap_or(0),
            capture: Mutex::new(Capture::No),
            ordinal: device,
            context,
            stream,
            copies,
        })
    }

    fn check(&self, operation: &'static str, result: CUresult) -> Result<()> {
        check(&self.name, operation, result)
    }

    fn capture(&self) -> MutexGuard<'_, Capture> {
        self.capture.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a capture without a graph: the stream issues again.
    fn abandon(&self, capture: &mut Capture) {
        let mut graph = ptr::null_mut();
        // SAFETY: the stream is being captured, or the driver says that it is not; a graph
        // that comes back is destroyed once.
        unsafe {
            let result = sys::cuStreamEndCapture(self.stream, &raw mut graph);
            if result == CUresult::CUDA_SUCCESS && !graph.is_null() {
                sys::cuGraphDestroy(graph);
            }
        }
        *capture = Capture::Broken;
    }

    /// Before what can't be recorded: waiting, and copies that this side fills or reads.
    pub fn not_recorded(&self) {
        let mut capture = self.capture();
        if matches!(*capture, Capture::Open(_)) {
            self.abandon(&mut capture);
        }
    }

    /// Before what can be recorded, but by the thread alone that began.
    fn recordable(&self) {
        let mut capture = self.capture();
        if matches!(*capture, Capture::Open(owner) if owner != thread::current().id()) {
            self.abandon(&mut capture);
        }
    }

    /// Makes the context current on this thread.
    fn current(&self) -> Result<()> {
        // SAFETY: the context lives as long as this.
        self.check("entering its context", unsafe {
            sys::cuCtxSetCurrent(self.context)
        })
    }

    /// Free and total bytes.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.current()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two integers.
        let result = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        self.check("asking for its memory", result)?;
        Ok((free as u64, total as u64))
    }

    pub fn alloc(&self, bytes: usize) -> Result<u64> {
        self.current()?;
        let mut address = 0;
        // SAFETY: writes an address.
        let result = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)) };
        if result == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (free, total) = self.memory()?;
            return Err(DeviceError::OutOfMemory {
                device: self.name.clone(),
                needed: bytes as u64,
                free,
                total,
            });
        }
        self.check("allocating", result)?;
        Ok(address)
    }

    /// Waits for the stream, then frees; a lost device's memory is gone anyway.
    pub fn free(&self, address: u64) {
        self.not_recorded();
        if self.current().is_ok() {
            // SAFETY: the address came from `alloc`, and nothing that was issued uses it.
            unsafe {
                sys::cuStreamSynchronize(self.stream);
                sys::cuMemFree_v2(address);
            }
        }
    }

    /// Memory here that copies can be made from behind the caller's back.
    pub fn pinned(&self, bytes: usize) -> Result<*mut u8> {
        self.current()?;
        let mut pointer: *mut c_void = ptr::null_mut();
        // SAFETY: writes a pointer.
        let result = unsafe { sys::cuMemAllocHost_v2(&raw mut pointer, bytes) };
        self.check("allocating pinned memory", result)?;
        Ok(pointer.cast())
    }

    /// # Safety
    /// The pointer came from [`Gpu::pinned`], and nothing uses it any more.
    pub unsafe fn free_pinned(&self, pointer: *mut u8) {
        if self.current().is_ok() {
            // SAFETY: the caller's promise.
            unsafe { sys::cuMemFreeHost(pointer.cast()) };
        }
    }

    pub fn sync(&self) -> Result<()> {
        self.sync_on(Stream::Work)
    }

    fn raw(&self, stream: Stream) -> sys::CUstream {
        match stream {
            Stream::Work => self.stream,
            Stream::Copies => self.copies,
        }
    }

    /// Waits for one of the streams.
    pub fn sync_on(&self, stream: Stream) -> Result<()> {
        self.current()?;
        self.not_recorded();
        // SAFETY: the stream lives as long as this.
        self.check("waiting for it", unsafe {
            sys::cuStreamSynchronize(self.raw(stream))
        })
    }

    /// Whether all that was issued is done.
    pub fn is_idle(&self) -> Result<bool> {
        self.current()?;
        self.not_recorded();
        // SAFETY: the stream lives as long as this.
        match unsafe { sys::cuStreamQuery(self.stream) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => self.check("waiting for it", result).map(|()| true),
        }
    }

    /// An event that nothing has recorded, so it has passed.
    pub fn event(&self) -> Result<Event> {
        self.current()?;
        let mut event = ptr::null_mut();
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes a handle.
        let result = unsafe { sys::cuEventCreate(&raw mut event, flags) };
        self.check("making an event", result)?;
        Ok(Event(event))
    }

    /// The event passes when what was issued to the stream so far is done.
    pub fn record(&self, stream: Stream, event: &Event) -> Result<()> {
        self.current()?;
        self.not_recorded();
        // SAFETY: both live.
        let result = unsafe { sys::cuEventRecord(event.0, self.raw(stream)) };
        self.check("recording an event", result)
    }

    /// What is issued to the stream from now on waits for the event.
    pub fn wait_on(&self, stream: Stream, event: &Event) -> Result<()> {
        self.current()?;
        self.not_recorded();
        // SAFETY: both live.
        let result = unsafe { sys::cuStreamWaitEvent(self.raw(stream), event.0, 0) };
        self.check("ordering its streams", result)
    }

    /// Whether an event has passed.
    pub fn has_passed(&self, event: &Event) -> Result<bool> {
        self.current()?;
        // SAFETY: it lives.
        match unsafe { sys::cuEventQuery(event.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => self.check("copying to it", result).map(|()| true),
        }
    }

    /// Waits until an event has passed.
    pub fn wait_for(&self, event: &Event) -> Result<()> {
        self.current()?;
        // SAFETY: it lives.
        self.check("copying to it", unsafe { sys::cuEventSynchronize(event.0) })
    }

    /// # Safety
    /// `src` is valid until the stream has been waited for; `dst` has room.
    pub unsafe fn copy_in_on(
        &self,
        stream: Stream,
        dst: u64,
        src: *const u8,
        bytes: usize,
    ) -> Result<()> {
        self.current()?;
        self.not_recorded();
        let stream = self.raw(stream);
        // SAFETY: the caller's promise.
        let result = unsafe { sys::cuMemcpyHtoDAsync_v2(dst, src.cast(), bytes, stream) };
        self.check("copying to it", result)
    }

    /// # Safety
    /// `src` is valid until the stream has been waited for; `dst` has room.
    pub unsafe fn copy_in(&self, dst: u64, src: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.copy_in_on(Stream::Work, dst, src, bytes) }
    }

    /// # Safety
    /// `dst` is valid until the stream has been waited for; `src` is as long.
    pub unsafe fn copy_out(&self, dst: *mut u8, src: u64, bytes: usize) -> Result<()> {
        self.current()?;
        self.not_recorded();
        // SAFETY: the caller's promise.
        let result = unsafe { sys::cuMemcpyDtoHAsync_v2(dst.cast(), src, bytes, self.stream) };
        self.check("copying from it", result)
    }

    /// # Safety
    /// Both are valid for `bytes` and don't overlap.
    pub unsafe fn copy_inside(&self, dst: u64, src: u64, bytes: usize) -> Result<()> {
        self.current()?;
        self.recordable();
        // SAFETY: the caller's promise.
        let result = unsafe { sys::cuMemcpyDtoDAsync_v2(dst, src, bytes, self.stream) };
        self.check("copying inside it", result)
    }

    /// # Safety
    /// `dst` is valid for `bytes`.
    pub unsafe fn clear(&self, dst: u64, bytes: usize) -> Result<()> {
        self.current()?;
        self.recordable();
        // SAFETY: the caller's promise.
        let result = unsafe { sys::cuMemsetD8Async(dst, 0, bytes, self.stream) };
        self.check("clearing", result)
    }

    /// A module from PTX text, which must end in a NUL.
    pub fn module(&self, image: &[u8]) -> Result<sys::CUmodule, CUresult> {
        assert_eq!(image.last(), Some(&0));
        let _ = self.current();
        let mut module = ptr::null_mut();
        // SAFETY: a terminated text, no options.
        let result = unsafe {
            sys::cuModuleLoadDataEx(
                &raw mut module,
                image.as_ptr().cast(),
                0,
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        match result {
            CUresult::CUDA_SUCCESS => Ok(module),
            other => Err(other),
        }
    }

    pub fn function(&self, module: sys::CUmodule, name: &CStr) -> Result<sys::CUfunction> {
        self.current()?;
        let mut function = ptr::null_mut();
        // SAFETY: the module was loaded and the name is terminated.
        let result = unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) };
        self.check("finding a kernel", result)?;
        // Those that ask for more shared memory than any block gets unasked.
        if [&b"mul_mat_"[..], b"attention_tiles_"]
            .iter()
            .any(|p| name.to_bytes().starts_with(p))
        {
            let what = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was just found.
            let result = unsafe { sys::cuFuncSetAttribute(function, what, self.shared as i32) };
            self.check("asking for shared memory", result)?;
        }
        Ok(function)
    }

    /// The stream, for libraries that issue to it.
    pub fn stream(&self) -> Result<sys::CUstream> {
        self.current()?;
        self.recordable();
        Ok(self.stream)
    }

    /// # Safety
    /// `arguments` point to values of the kernel's parameter types, in order, and the
    /// addresses among them are valid for what the kernel does with this grid.
    pub unsafe fn launch(
        &self,
        name: &'static CStr,
        function: sys::CUfunction,
        grid: [usize; 3],
        block: usize,
        shared: usize,
        arguments: &mut [*mut c_void],
    ) -> Result<()> {
        self.current()?;
        self.recordable();
        let [x, y, z] = grid.map(|n| n as u32);
        // SAFETY: the caller's promise.
        let result = unsafe {
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                block as u32,
                1,
                1,
                shared as u32,
                self.stream,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        let launched = self.check(name.to_str().unwrap_or("a kernel"), result);
        if launched.is_err() {
            self.not_recorded();
        }
        launched
    }

    /// Records what this thread issues from now on. A recording that is still open, because
    /// whoever began it never came to its end, is dropped.
    pub fn begin_capture(&self) -> Result<()> {
        self.current()?;
        let mut capture = self.capture();
        if matches!(*capture, Capture::Open(_)) {
            self.abandon(&mut capture);
        }
        *capture = Capture::No;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream lives as long as this.
        let result = unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) };
        self.check("recording", result)?;
        *capture = Capture::Open(thread::current().id());
        Ok(())
    }

    /// Drops a recording that is open, if there is one.
    pub fn drop_capture(&self) {
        let mut capture = self.capture();
        if matches!(*capture, Capture::Open(_)) {
            self.abandon(&mut capture);
        }
        *capture = Capture::No;
    }

    /// Ends a recording; the stream issues again, whatever comes of it.
    ///
    /// # Errors
    /// Why there is none, in words; then nothing that was recorded has run.
    pub fn end_capture(&self) -> Result<Recorded, String> {
        self.current().map_err(|e| e.to_string())?;
        let mut capture = self.capture();
        let was = std::mem::replace(&mut *capture, Capture::No);
        if !matches!(was, Capture::Open(_)) {
            return Err("something that can't be recorded came between".to_owned());
        }
        let (mut graph, mut exec) = (ptr::null_mut(), ptr::null_mut());
        let mut operations = 0;
        // SAFETY: the stream is being captured; the graph is destroyed once instantiated.
        unsafe {
            let result = sys::cuStreamEndCapture(self.stream, &raw mut graph);
            if result != CUresult::CUDA_SUCCESS || graph.is_null() {
                return Err(word(result));
            }
            let mut result = sys::cuGraphGetNodes(graph, ptr::null_mut(), &raw mut operations);
            if result == CUresult::CUDA_SUCCESS {
                result = sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0);
            }
            sys::cuGraphDestroy(graph);
            if result != CUresult::CUDA_SUCCESS {
                return Err(word(result));
            }
        }
        Ok(Recorded { exec, operations })
    }

    pub fn replay(&self, recorded: &Recorded) -> Result<()> {
        self.current()?;
        self.not_recorded();
        // SAFETY: both live; the buffers that the recording names live while it is kept.
        let result = unsafe { sys::cuGraphLaunch(recorded.exec, self.stream) };
        self.check("replaying a recording", result)
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.drop_capture();
        if self.current().is_ok() {
            // SAFETY: nothing uses the stream any more; the context was retained once.
            unsafe {
                for stream in [self.stream, self.copies] {
                    sys::cuStreamSynchronize(stream);
                    sys::cuStreamDestroy_v2(stream);
                }
                sys::cuDevicePrimaryCtxRelease_v2(self.ordinal);
            }
        }
    }
}

/// Operations that can be issued at once.
pub(crate) struct Recorded {
    exec: sys::CUgraphExec,
    /// How many they are.
    pub operations: usize,
}

// SAFETY: a handle of the driver, used under the device's lock.
unsafe impl Send for Recorded {}

impl Drop for Recorded {
    fn drop(&mut self) {
        // SAFETY: destroyed once; the driver waits for a launch under way.
        unsafe { sys::cuGraphExecDestroy(self.exec) };
    }
}

/// A place in the order of a stream.
pub(crate) struct Event(sys::CUevent);

// SAFETY: a handle of the driver, used under a lock of its owner's.
unsafe impl Send for Event {}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: destroyed once; the driver waits until it has passed.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_drivers_are_refused_with_what_they_know() {
        assert_eq!(new_enough(12_000), Ok(()));
        assert_eq!(new_enough(13_010), Ok(()));
        let error = new_enough(11_080).unwrap_err();
        assert!(matches!(error, DeviceError::Unusable(_)));
        assert_eq!(
            error.to_string(),
            "the NVIDIA driver is too old: it knows CUDA 11.8, and 12.0 is needed"
        );
    }
}
