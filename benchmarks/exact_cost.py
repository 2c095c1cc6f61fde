"""What coding with the integer hyper-synthesis costs in bytes, against the float one.

  python -m benchmarks.exact_cost --workdir train_xms/<xid>/wid=<N>-... --dataset kodak

The same latents of each picture are coded both ways; beside them the estimate (negative log2
likelihood by the float hyper-synthesis).
"""

import argparse

import tqdm

from common import data, runs


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True)
  parser.add_argument("--dataset", required=True)
  args = parser.parse_args()
  from common import bitstream, eval_lib, rd
  from mshyper.codec import build

  try:
    run = runs.RunDir.open(args.workdir)
  except runs.RunError as e:
    parser.error(str(e))
  if run.read_work_unit().family != "mshyper":
    parser.error(f"{args.workdir} is no run of mshyper: others have no hyper-synthesis.")
  codecs = {
    exact: eval_lib.load_codec(run, lambda c, e=exact: build({**c, "exact_coding": e}))[0]
    for exact in (True, False)
  }
  images = data.load_eval_images(args.dataset)
  rows: list[tuple[float, int, int, int]] = []
  for _, image in tqdm.tqdm(images):
    latents = rd.infer(codecs[True], rd.to_batch(image))
    size = (image.shape[0], image.shape[1])
    files = {exact: codec.pack(latents, size) for exact, codec in codecs.items()}
    header = len(files[True]) - sum(map(len, bitstream.read(files[True]).sections))
    estimate, _ = eval_lib.estimate(codecs[True], image)
    rows.append((estimate / 8, len(files[False]), len(files[True]), header))
  estimate, in_float, exact, header = (sum(column) for column in zip(*rows))
  costs = [100 * (e / f - 1) for _, f, e, _ in rows]
  print(f"{len(rows)} pictures, {args.workdir}")
  print(f"estimate                    {estimate:12,.0f} bytes")
  print(
    f"files, float hyper-synthesis {in_float:11,d} bytes, {100 * (in_float / estimate - 1):+.3f}%"
  )
  print(f"files, integer hyper-synthesis {exact:9,d} bytes, {100 * (exact / estimate - 1):+.3f}%")
  print(
    f"integer against float: {100 * (exact / in_float - 1):+.4f}% in all, {min(costs):+.4f}% to "
    f"{max(costs):+.4f}% a picture; headers {100 * header / exact:.3f}% of the files"
  )


if __name__ == "__main__":
  main()
