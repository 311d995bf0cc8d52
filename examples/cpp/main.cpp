// Images of a model, without Python:
//
//     sample PACKAGE.pt2 COUNT OUT
//
// The package is one of `python -m ctm_fast.export F --format pt2`, which starts with seeds; COUNT images, of the seeds
// 0, 1, ... and of each class in turn, go to OUT: a grid, if it is a .ppm or .pgm, else float32 [COUNT, C, H, W] as it
// is in memory, in [-1, 1].
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

using torch::indexing::Slice;

class Model {
 public:
  explicit Model(const std::string& path) : package_(path), about_(package_.get_metadata()) {
    if (text("format") != "ctm_fast.export.1" || text("start") != "seeds") {
      throw std::runtime_error(path + ": expected a package of ctm_fast.export that starts with seeds");
    }
  }

  // [count, C, H, W] float32 on the CPU: those of the seeds 0 to count - 1.
  at::Tensor sample(int64_t count) {
    const int64_t fewest = std::stoll(text("batch_min"));
    const int64_t most = std::stoll(text("batch_max"));
    const int64_t classes = std::stoll(text("num_classes"));
    std::vector<at::Tensor> images;
    for (int64_t first = 0; first < count; first += most) {
      const int64_t wanted = std::min(most, count - first);
      const int64_t batch = std::max(fewest, wanted);  // what is more than wanted is dropped
      const at::Tensor seeds = torch::arange(first, first + batch, torch::kInt64);
      std::vector<at::Tensor> inputs{seeds.to(text("device"))};
      if (classes > 0) {
        inputs.push_back(seeds.remainder(classes).to(text("device")));
      }
      images.push_back(package_.run(inputs).at(0).slice(0, 0, wanted).cpu());
    }
    return torch::cat(images).contiguous();
  }

 private:
  std::string text(const std::string& key) const {
    const auto found = about_.find(key);
    return found == about_.end() ? "" : found->second;
  }

  torch::inductor::AOTIModelPackageLoader package_;
  std::unordered_map<std::string, std::string> about_;
};

void write(const std::string& path, const std::string& header, const at::Tensor& content) {
  std::ofstream file(path, std::ios::binary);
  file << header;
  file.write(static_cast<const char*>(content.const_data_ptr()), static_cast<std::streamsize>(content.nbytes()));
  if (!file.flush()) {
    throw std::runtime_error(path + ": cannot be written");
  }
}

void write_grid(const std::string& path, const at::Tensor& images) {
  const int64_t count = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  const int64_t columns = std::llround(std::ceil(std::sqrt(count)));
  const int64_t rows = (count + columns - 1) / columns;
  at::Tensor grid = torch::full({rows * height, columns * width, channels}, 255, torch::kUInt8);
  const at::Tensor levels = (images * 127.5 + 127.5).round().to(torch::kUInt8).permute({0, 2, 3, 1});
  for (int64_t i = 0; i < count; ++i) {
    const int64_t top = i / columns * height, left = i % columns * width;
    grid.index_put_({Slice(top, top + height), Slice(left, left + width)}, levels[i]);
  }
  const std::string size = std::to_string(columns * width) + " " + std::to_string(rows * height);
  write(path, (channels == 1 ? "P5\n" : "P6\n") + size + "\n255\n", grid);
}

int main(int argc, char** argv) try {
  const int64_t count = argc == 4 ? std::atoll(argv[2]) : 0;
  if (count < 1) {
    throw std::runtime_error("expected PACKAGE.pt2 COUNT OUT, COUNT from 1 on");
  }
  const std::string out = argv[3];
  const c10::InferenceMode no_gradients;
  const at::Tensor images = Model(argv[1]).sample(count);
  out.ends_with(".ppm") || out.ends_with(".pgm") ? write_grid(out, images) : write(out, "", images);
} catch (const c10::Error& error) {
  std::cerr << "error: " << error.what_without_backtrace() << "\n";
  return 2;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return 2;
}
