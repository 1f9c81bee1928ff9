# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of encdiff
#
# From an image to its concepts and back, with a model that comes with the package. Nothing is downloaded, no GPU is
# needed, and all of it takes less than a minute. `tour.ipynb` is made from `tour.py` by `make notebook`; as a script it
# writes its pictures into the current folder: `python examples/tour.py`.

# %%
from encdiff import EncDiff, evaluate, open_dataset, to_float
from encdiff.pictures import (
    attention_picture,
    concept_groups,
    encode_images,
    factor_paths,
    factor_traversal,
    save_png,
    swap_grid,
)

# %% [markdown]
# ## Images
#
# A room in six factors: the hues of floor, wall and object, the object's scale and shape, and where the camera stands.
# The model was trained on these 10,000 pictures and has never seen a label.

# %%
room = open_dataset("procedural:5,5,5,4,4,5", image_size=64)
for name, size in zip(room.factor_names, room.factor_sizes, strict=True):
    print(f"{name}: {size} values")
indices = [1234, 8765]
images = to_float(room.images(indices))  # float32 (2, 3, 64, 64) in [-1, 1]

# %% [markdown]
# ## Concepts
#
# The encoder turns an image into 20 scalars, one for each concept. Images with the same floor should have the same
# numbers in the concepts of the floor, whatever else is in them.

# %%
model = EncDiff.from_pretrained("room64")
scalars = encode_images(model, images)
print(tuple(scalars.shape), scalars[0, :5])

# %% [markdown]
# ## Which concept holds which factor?
#
# Labels are needed to ask this, not to train. A FactorVAE score of 1 says that a vote among the concepts names, each
# time, the factor that a batch of images has in common. DCI's `importance` says how much each concept tells of each
# factor; these samples are few, so that it takes seconds.

# %%
scores = evaluate(model, room, protocol="quick", dci_train=200, dci_test=100)
print(f"FactorVAE score {scores['factor_vae']['eval_accuracy']:.3f}")
groups = concept_groups(scores["dci"]["importance"], room.factor_names)
for factor, concepts in groups.items():
    print(f"{factor}: concepts {concepts}")

# %% [markdown]
# ## Swap
#
# The concepts of one factor are taken from the source, all others from the target: in the column `wall hue` the target
# should have the source's wall, and nothing else should differ from `reconstructed`.

# %%
picture = swap_grid(model, sources=images[:1], targets=images[1:], groups=groups, steps=10)
save_png(picture, "tour-swap.png")
picture

# %% [markdown]
# ## Traverse
#
# The concepts of one factor move together, through the values that they have in the images of the data which differ in
# that factor alone; these images stand below. A hue is held by several concepts, so that one of them alone would change
# it between some of its values only, or leave the data: `encdiff.pictures.traversal` shows that.

# %%
paths = factor_paths(room, indices[0], groups)
picture = factor_traversal(model, images[0], paths, steps=10)
save_png(picture, "tour-traverse.png")
picture

# %% [markdown]
# ## Attend
#
# Where the U-Net looks at each of these concepts: bright is much. A concept of the floor should be bright on the floor,
# or dark everywhere, where another concept of the floor holds the hue that this image has.

# %%
shown = {groups[factor][0]: factor for factor in groups}
picture = attention_picture(model, images, labels=shown)
save_png(picture, "tour-attend.png")
picture

# %% [markdown]
# ## Further
#
# `own_images.py` trains on your pictures, `score_codes.py` scores another model, `op_in_module.py` and `own_sampler.py`
# are for those who have a network of their own.
