# PASCAL VOC 2012 alone, 1464 training images with the challenge's own labels: the last stage.
_base_ = './pascal_voc12_aug_513x513.py'  # pipelines and validation set

train_dataloader = dict(
    _delete_=True,
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset={{_base_.dataset_train}})
